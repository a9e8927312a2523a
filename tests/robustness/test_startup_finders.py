"""The import hook beside finders and loaders that misbehave; Python without the shim is the oracle.

Each scenario runs in two forked children, one without the shim's finder: both see the same
exceptions and the same values. Where a target is not patched, the state says why.
"""

from __future__ import annotations

import pytest
from tally import tally

PATCHES = (
    'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"), target("vllm.more:g"))'
)
SCRIPT = """
import importlib, importlib.machinery, importlib.util, json, os, random, signal, sys, threading
import time, types, warnings
import packaging.specifiers, wrapt
from ascend_patch import _apply, _bootstrap, _hooks, _plan, _plugin, _runtime, _selftest, _verify
warnings.simplefilter("ignore")
NAMES = ("vllm", "vllm.ops", "vllm.more", "vllm.user", "vllm._version")
PathFinder, ModuleSpec = importlib.machinery.PathFinder, importlib.machinery.ModuleSpec
ERRORS = (ImportError, RuntimeError, KeyError, SystemExit, GeneratorExit, MemoryError)

class OwnSpec(ModuleSpec):
    pass

class FrozenSpec(ModuleSpec):
    # Its loader cannot be set again.
    def __setattr__(self, name, value):
        if name == "loader" and "loader" in vars(self):
            raise TypeError("frozen")
        super().__setattr__(name, value)

class OwnModule(types.ModuleType):
    pass

class Wrapping:
    def __init__(self, loader):
        self.loader = loader
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loader.exec_module(module)

class MakesModule(Wrapping):
    def create_module(self, spec):
        return OwnModule(spec.name)

class WithoutCreate:
    def __init__(self, loader):
        self.loader = loader
    def exec_module(self, module):
        self.loader.exec_module(module)

class Raising(Wrapping):
    error, late = RuntimeError, False
    def exec_module(self, module):
        if self.late:
            super().exec_module(module)
        raise self.error("from a loader")

class RaisingCreate(Wrapping):
    def create_module(self, spec):
        raise RuntimeError("from create_module")

class Replacing(Wrapping):
    def exec_module(self, module):
        super().exec_module(module)
        new = types.ModuleType(module.__name__)
        vars(new).update(vars(module))
        sys.modules[module.__name__] = new

class Legacy:
    def __init__(self, loader):
        self.loader = loader
    def load_module(self, name):
        return self.loader.load_module(name)

class Neither:
    def __init__(self, loader):
        pass

class OddEquality:
    def __eq__(self, other):
        raise RuntimeError("not to be compared")
    __hash__ = None

def is_the_shim(finder):
    return type(finder).__module__ == "ascend_patch._finder"

class Misbehaving:
    def __init__(self, chance):
        self.what = chance.choice(BEHAVIOURS)
        self.name = chance.choice(NAMES)
        self.error = chance.choice(ERRORS)
        self.other = chance.choice(NAMES)
        self.loader = chance.choice(LOADERS)
        self.late = chance.random() < 0.5
        self.left = chance.choice((1, 1000))
        self.busy = False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.busy or self.left <= 0:
            return None
        self.left -= 1
        self.busy = True
        try:
            return getattr(self, self.what)(name, path)
        finally:
            self.busy = False

    def found(self, name, path):
        return PathFinder.find_spec(name, path)
    def raises(self, name, path):
        raise self.error("from a finder")
    def integer(self, name, path):
        return 5
    def namespace_object(self, name, path):
        spec = PathFinder.find_spec(name, path)
        return types.SimpleNamespace(
            name=name, loader=spec.loader, origin=spec.origin, cached=None, has_location=True,
            submodule_search_locations=spec.submodule_search_locations, parent="vllm",
            loader_state=None)
    def without_loader(self, name, path):
        return ModuleSpec(name, None, is_package=True)
    def own_spec(self, name, path, kind=OwnSpec):
        found = PathFinder.find_spec(name, path)
        spec = kind(name, found.loader, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        spec.has_location = True
        return spec
    def frozen_spec(self, name, path):
        return self.own_spec(name, path, FrozenSpec)
    def other_name(self, name, path):
        spec = PathFinder.find_spec(name, path)
        spec.name = "vllm_of_another_name"
        return spec
    def own_loader(self, name, path):
        spec = PathFinder.find_spec(name, path)
        loader = self.loader(spec.loader)
        if self.loader is Raising:
            loader.error, loader.late = self.error, self.late
        spec.loader = loader
        return spec
    def lazy(self, name, path):
        spec = PathFinder.find_spec(name, path)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec
    def new_list(self, name, path):
        sys.meta_path = list(sys.meta_path)
    def removes_the_shim(self, name, path):
        sys.meta_path = [f for f in sys.meta_path if not is_the_shim(f)]
    def removes_itself(self, name, path):
        # Another list: one that shrinks while it is gone through hides a finder from importlib.
        sys.meta_path = [f for f in sys.meta_path if f is not self]
    def reverses(self, name, path):
        sys.meta_path = sys.meta_path[::-1]
    def asks_again(self, name, path):
        return importlib.util.find_spec(name)
    def imports_another(self, name, path):
        try:
            importlib.import_module(self.other)
        except BaseException:
            pass
    def imports_in_a_thread(self, name, path):
        # Nothing of the host, whose import locks this thread holds.
        module = "replacements" if self.late else "nowhere_at_all"
        thread = threading.Thread(target=importlib.import_module, args=(module,), daemon=True)
        # It may have to wait for this one, which holds importlib's lock of all finders.
        thread.start(); thread.join(0.1)

BEHAVIOURS = [n for n in vars(Misbehaving) if not n.startswith("_") and n != "find_spec"]
LOADERS = [importlib.util.LazyLoader, Wrapping, MakesModule, WithoutCreate, Raising, RaisingCreate,
           Replacing, Legacy, Neither]
threading.excepthook = lambda *_: None

class WithoutFindSpec:
    # Up to Python 3.11 importlib asks `find_module`.
    def __init__(self, name):
        self.name = name
    def find_module(self, name, path=None):
        if name == self.name:
            return PathFinder.find_spec(name, path).loader

class OddAttributes(OddEquality):
    find_spec = property(lambda self: (_ for _ in ()).throw(AttributeError("no")))

def one(chance):
    kind = chance.randrange(12)
    if kind == 0:
        return WithoutFindSpec(chance.choice(NAMES))
    if kind == 1:
        return OddAttributes()
    return Misbehaving(chance)

def operate(chance):
    what = chance.choice(("import", "import", "import", "probe", "reload", "forget"))
    name = chance.choice(NAMES)
    try:
        if what == "import":
            importlib.import_module(name)
        elif what == "probe":
            importlib.util.find_spec(name)
        elif what == "reload" and name in sys.modules:
            importlib.reload(sys.modules[name])
        elif what == "forget":
            sys.modules.pop(name, None)
    except BaseException as error:
        return [what, name, type(error).__name__]
    return [what, name, "fine"]

def called(module, function):
    try:
        return getattr(sys.modules[module], function)(1)
    except BaseException as error:
        return type(error).__name__

def scenario(seed, with_shim):
    chance = random.Random(seed)
    if not with_shim:
        Misbehaving.removes_the_shim(None, "", None)
    for _ in range(chance.randrange(1, 4)):
        where, finder = chance.random(), one(chance)
        others = [f for f in sys.meta_path if not is_the_shim(f)]
        before = others[int(where * len(others))]
        # Among the others it has the same place in both; the shim's is somewhere between.
        index = next(i for i, f in enumerate(sys.meta_path) if f is before)
        sys.meta_path.insert(index, finder)
    done = [operate(chance) for _ in range(chance.randrange(2, 7))]
    values = [called("vllm.ops", "f"), called("vllm.more", "g"), called("vllm.user", "call")]
    out = dict(done=done, values=values, what=[vars(f) if hasattr(f, "__dict__") else 0
               for f in sys.meta_path if type(f) is Misbehaving])
    if with_shim:
        try:
            _plugin.load()
        except BaseException as error:
            out["plugin"] = type(error).__name__
        state = _runtime.current().state
        out["patched"] = [called("vllm.ops", "f"), called("vllm.more", "g")]
        out["why"] = [*state.problems, *(n for p in state.patches.values() for n in p.notes)]
        patches = state.patches.values()
        out["why"] += [p.reason for p in patches if p.state not in ("applied", "armed")]
        out["why"] += [t.reason for p in patches for t in p.targets if t.reason]
    return out

def in_a_child(*arguments):
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(25)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(write, json.dumps(scenario(*arguments), default=repr).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.wait()
    return json.loads(text) if text else dict(done="it died", values=[], patched=[], why=[])

begun, results = time.monotonic(), []
for seed in range(SEED, SEED + MOST):
    if time.monotonic() - begun < SECONDS:
        results.append([seed, in_a_child(seed, False), in_a_child(seed, True)])
print(json.dumps(results))
"""


def without_ours(value: object) -> object:
    return [x for x in value if x != "ours"] if isinstance(value, list) else value


def differences(results):
    """Scenarios in which the shim shows, and those in which a target is unpatched in silence."""
    shows, silent = [], []
    for seed, bare, ours in results:
        values = [without_ours(value) for value in ours["values"]]
        if (bare["done"], bare["values"]) != (ours["done"], values) or "plugin" in ours:
            shows.append((seed, bare["done"], bare["values"], ours["done"], ours["values"]))
        for value in ours["patched"]:
            if isinstance(value, list) and value[0] != "ours" and not ours["why"]:
                silent.append((seed, ours))
    return shows, silent


@pytest.mark.fault("shim_error_ends_import")
@pytest.mark.parametrize(
    "most", [pytest.param(300, id="some"), pytest.param(1500, id="many", marks=pytest.mark.slow)]
)
def test_beside_misbehaving_finders_python_behaves_as_without_the_shim(host, seed, most):
    host.patches(PATCHES)
    results = []
    # In batches, each within the time limit of a process.
    for _ in range(most // 25):
        if len(results) < most:
            left = most - len(results)
            given = f"SEED, MOST, SECONDS = {seed + len(results)}, {left}, 30\n"
            found = host.run(f"{given}{SCRIPT}", fails=True)
            assert found.code == 0, found.err
            results += found.value
    assert len(results) == most
    shows, silent = differences(results)
    assert shows == []
    assert silent == []
    patched = sum(["ours", "f", 1] in ours["patched"] for _, _, ours in results)
    failed = sum(any(step[2] != "fine" for step in bare["done"]) for _, bare, _ in results)
    assert patched, "nothing was patched in any scenario"
    assert failed, "nothing misbehaved in any scenario"
    tally(
        "the import hook beside misbehaving finders and loaders",
        tried=len(results),
        unit="scenarios",
        seed=seed,
        note=f"{failed} with failed imports, the same without the shim; {patched} patched",
    )
