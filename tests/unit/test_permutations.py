"""Every order of importing, applying, reverting, reloading and foreign wrapping, up to five steps.

An oracle of a few lines, which knows nothing of modules, classes or wrapt, says which layers a
call goes through after each sequence. What is found must be exactly that, each layer once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import random
import sys
import types
from importlib.util import spec_from_loader

import pytest
import wrapt

from ascend_patch._finder import Finder
from ascend_patch._registry import Target

STEPS = ("import", "begin", "revert", "apply", "reload", "reimport", "wrap")
# Found by chance among the longer ones, so that they are asked every time since.
ONCE_WRONG = (
    ("import", "begin", "wrap", "revert", "apply"),
    ("begin", "import", "wrap", "revert", "apply"),
)


class Layer:
    """What the oracle takes for a function: it may be ours, a stranger's, or the original."""

    def __init__(self, name: str, inner: Layer | None = None) -> None:
        self.name, self.inner, self.on = name, inner, True

    def called(self) -> list[str]:
        below = self.inner.called() if self.inner else []
        return [self.name, *below] if self.on else below

    def chain(self) -> list[Layer]:
        return [self, *(self.inner.chain() if self.inner else [])]


class Oracle:
    """What must be observed after each step."""

    def __init__(self, seam: str, stranger: str) -> None:
        self.seam, self.state = seam, "off"
        # A wrapt wrapper lets ours beneath it.
        self.refused = stranger != "wrapt"
        self.target: Layer | None = None  # None: not imported
        self.alias: Layer | None = None
        self.ours: list[Layer] = []
        self.beneath: dict[Layer, Layer] = {}
        self.known: Layer | None = None  # what was around ours from the beginning

    def step(self, name: str) -> None:
        getattr(self, "do_" + name)()

    def execute(self) -> None:
        self.target = Layer("original")
        if self.state in ("armed", "applied"):
            self.attach()

    def attach(self) -> None:
        kept = [layer for layer in self.target.chain() if layer in self.ours]
        if kept:
            kept[0].on = True
            if self.alias is kept[0].inner:
                self.alias = kept[0]
        elif self.seam == "traced" and self.target.name == "foreign":
            if self.refused:
                self.take_back()
                self.state = "failed"
                return
            self.attach_beneath()
        else:
            new = Layer("ours", self.target)
            self.ours.append(new)
            if self.alias is self.target:
                self.alias = new
            self.target = new
        self.state = "applied"

    def attach_beneath(self) -> None:
        original = self.target.chain()[-1]
        holder = self.target.chain()[-2]
        holder.inner = Layer("ours", original)
        self.ours.append(holder.inner)
        self.beneath[holder], self.known = holder.inner, self.target
        if self.alias is original:
            self.alias = holder.inner

    def take_back(self) -> None:
        for holder, layer in self.beneath.items():
            holder.inner = layer.inner
        self.beneath.clear()
        for layer in self.ours:
            layer.on = False
            if self.target is layer:
                self.target = layer.inner
            if self.alias is layer:
                self.alias = layer.inner

    def do_import(self) -> None:
        if self.target is None:
            self.execute()
            self.alias = self.target

    def do_begin(self) -> None:
        if self.state == "off":
            self.state = "armed"
            if self.target:
                self.attach()

    def do_revert(self) -> None:
        if self.state in ("armed", "applied"):
            self.take_back()
            self.state = "reverted"

    def do_apply(self) -> None:
        if self.state == "reverted":
            self.state = "armed"
            if self.target:
                self.attach()

    def do_reload(self) -> None:
        if self.target:
            self.execute()

    do_reimport = do_reload

    def do_wrap(self) -> None:
        if self.target:
            self.target = Layer("foreign", self.target)


KINDS = {
    "function": ("f", "def f(x): return ['original']\n", "m.f"),
    "method": ("C.f", "class C:\n  def f(self, x): return ['original']\n", "m.C()"),
    "inherited": (
        "C.f",
        "class B:\n  def f(self, x): return ['original']\nclass C(B): pass\n",
        "m.C()",
    ),
    "static": ("C.f", "class C:\n  @staticmethod\n  def f(x): return ['original']\n", "m.C()"),
    "class": ("C.f", "class C:\n  @classmethod\n  def f(self, x): return ['original']\n", "m.C"),
}


class World:
    """The real thing: modules made in memory, a finder, an applier, and a stranger who wraps."""

    def __init__(self, bench, kind: str, seam: str, stranger: str) -> None:
        self.bench, self.stranger = bench, stranger
        self.qualname, source, _ = KINDS[kind]
        self.code = compile(source, "ap_m.py", "exec")
        replacement = "method" if kind in ("method", "inherited", "class") else "function"
        self.declared = Target(
            f"ap_m:{self.qualname}", seam, f"ap_ours:{'host' if seam == 'host' else replacement}"
        )
        self.patch = None

    def find_spec(self, name, *_):
        return spec_from_loader(name, self) if name == "ap_m" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        exec(self.code, vars(module))
        self.raw = inspect.getattr_static(self.owner(module), "f")

    def owner(self, module):
        return module.C if self.qualname == "C.f" else module

    def step(self, name: str) -> None:
        module = sys.modules.get("ap_m")
        if name == "import":
            if module is None:
                sys.modules["ap_user"] = user = types.ModuleType("ap_user")
                user.f = getattr(importlib.import_module("ap_m"), "f", None)
        elif name == "begin":
            self.patch = self.patch or self.bench.arm(self.declared)
        elif name == "revert" and self.patch:
            self.bench.applier.revert("demo")
        elif name == "apply" and self.patch:
            self.bench.applier.apply_again("demo", sys.modules)
        elif name == "reload" and module:
            importlib.reload(module)
        elif name == "reimport" and module:
            del sys.modules["ap_m"]
            importlib.import_module("ap_m")
        elif name == "wrap" and module:
            owner = self.owner(module)
            owner.f = self.wrapped(owner)

    def wrapped(self, owner):
        raw = inspect.getattr_static(owner, "f")
        if self.stranger == "wrapt":
            return wrapt.FunctionWrapper(raw, lambda f, _, a, k: ["foreign", *f(*a, **k)])
        inner, skipped = owner.f, isinstance(raw, classmethod)

        def foreign(*args):
            return ["foreign", *inner(*args[skipped:])]

        if self.stranger == "wraps":
            foreign = functools.wraps(inner)(foreign)
        kinds = (kind for kind in (staticmethod, classmethod) if isinstance(raw, kind))
        return next(kinds, lambda function: function)(foreign)


def play(steps, world: World, oracle: Oracle) -> None:
    for step in steps:
        world.step(step)
        oracle.step(step)
    assert (world.patch.state if world.patch else "off") == oracle.state
    if oracle.target is None:
        return
    owner = world.owner(sys.modules["ap_m"])
    instance = owner() if isinstance(owner, type) else owner
    assert instance.f(0) == oracle.target.called()
    if oracle.target.inner is None:  # the original: the very object, where it was
        assert inspect.getattr_static(owner, "f") is world.raw
        assert ("f" in vars(owner)) is not ("B" in vars(sys.modules["ap_m"]))
    if sys.modules["ap_user"].f is not None:
        assert sys.modules["ap_user"].f(0) == oracle.alias.called()
    wrapped_since = oracle.state == "applied" and oracle.target not in (*oracle.ours, oracle.known)
    assert bool(world.bench.applier.check()) == wrapped_since


@pytest.mark.expects_failure
@pytest.mark.parametrize("stranger", ["wrapt", "wraps", "closure"])
@pytest.mark.parametrize("seam", ["host", "traced"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_leaves_exactly_the_right_function(kind, seam, stranger, ours, seed, new_bench):
    chosen = random.Random(seed)
    sequences = [s for n in range(1, 4) for s in itertools.product(STEPS, repeat=n)]
    # Of the longer ones a random part a run, and only those that do something.
    longer = [s for n in (4, 5) for s in itertools.product(STEPS, repeat=n) if "begin" in s]
    sequences += [*ONCE_WRONG, *chosen.sample(longer, 250)]
    for steps in sequences:
        finder = Finder(lambda name, error: pytest.fail(f"{name}: {error!r}"))
        world = World(new_bench(finder), kind, seam, stranger)
        finder.arm()
        sys.meta_path.insert(1, world)
        try:
            play(steps, world, Oracle(seam, stranger))
        except Exception as error:
            raise AssertionError(f"after {' / '.join(steps)}") from error
        finally:
            finder.disarm()
            sys.meta_path.remove(world)
            for name in ("ap_m", "ap_user"):
                sys.modules.pop(name, None)
