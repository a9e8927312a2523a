"""Start-up: the shim's own faults end nothing, and what the user asked to be refused is refused."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakehost import REPOSITORY

SERVE = """
import json
from vllm.model_executor.model_loader import get_model_loader
import vllm.ops
get_model_loader().load_model()
print(json.dumps(vllm.ops.f(1)))
"""
PATCHED, UNPATCHED = '["ours", "f", 1]\n', '["f", 1]\n'
DRIFTED = "def f(x, y=1):\n    return ['f', x]\n"
DEMO = 'patch("demo", target("vllm.ops:f"))'

ERRORS = """
import asyncio
class Odd(BaseException):
    def __str__(self):
        raise ValueError("it cannot even be printed")
ERRORS = dict(
    RuntimeError=RuntimeError, MemoryError=MemoryError, RecursionError=RecursionError,
    SystemExit=SystemExit, GeneratorExit=GeneratorExit, Cancelled=asyncio.CancelledError, Odd=Odd,
)
def fail(*_, **__):
    raise ERRORS[NAME]("a fault was put here")
"""
FAULTS = {
    "audit hook": (
        "def hook(event, arguments):\n"
        "    if event == 'open' and 'status' in str(arguments[0]):\n        fail()\n"
        "import sys; sys.addaudithook(hook)\n"
    ),
    "stderr": "import sys; sys.stderr = type('Stream', (), {'write': fail, 'flush': fail})()\n",
    "status file": "from ascend_patch import _state; _state.ProcessState.snapshot = fail\n",
    "run directory": "from ascend_patch import _rundir; _rundir.enter = fail\n",
    "counters": "from ascend_patch import _calls; _calls.Counters.share = fail\n",
    "announcement": "from ascend_patch import _peers; _peers.at_work = fail\n",
    "finder": "from ascend_patch import _finder; _finder.Finder._stand_in = fail\n",
    "after import": "from ascend_patch import _finder; _finder.Finder.run_after = fail\n",
    "model loaded": "from ascend_patch import _apply; _apply.Applier.check = fail\n",
}


@pytest.mark.fault("shim_error_ends_import")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_exception_of_any_type_in_the_shim_ends_the_import(host, fault):
    host.patches(DEMO)
    # One process a kind of fault: each exception in a forked child of its own.
    script = (
        "import os, sys, traceback\n"
        "import ascend_patch._runtime, ascend_patch._apply, ascend_patch._hooks, wrapt\n"
        f"{ERRORS}\nfound = {{}}\n"
        "for NAME in ERRORS:\n"
        "    read, write = os.pipe()\n"
        "    if os.fork() == 0:\n"
        "        out = 'nothing'\n"
        "        try:\n"
        f"            exec({FAULTS[fault]!r})\n"
        "            import vllm.ops, vllm.model_executor.model_loader as loader\n"
        "            out = loader.get_model_loader().load_model() + vllm.ops.f(1)[-2]\n"
        "        except BaseException as error:\n"
        "            out = type(error).__name__\n"
        "        os.write(write, out.encode())\n"
        "        os._exit(0)\n"
        "    os.wait(); found[NAME] = os.read(read, 99).decode()\n"
        "import json; print(json.dumps(found))\n"
    )
    found = host.run(script, fails=True)
    assert found.code == 0, found.err
    assert set(found.value.values()) == {"modelf"}, found.value


@pytest.mark.fault("shim_error_ends_import")
def test_without_orig_argv_the_status_is_written(host):
    host.patches(DEMO)
    found = host.run(f"import sys; del sys.orig_argv\n{SERVE}", fails=True)
    assert (found.code, found.out) == (0, PATCHED), found.err
    assert found.patch("demo")["state"] == "applied"


@pytest.mark.fault("shim_error_ends_import")
@pytest.mark.parametrize("error", ["SystemExit", "GeneratorExit"])
def test_a_fork_handler_that_fails_ends_no_child(host, error):
    host.patches(DEMO)
    script = (
        "import multiprocessing, sys, vllm.ops\n"
        "from ascend_patch import _state\n"
        f"def fail(*_):\n    raise {error}(3)\n"
        "_state.ProcessState.snapshot = fail\n"
        "child = multiprocessing.get_context('fork').Process(target=vllm.ops.f, args=(1,))\n"
        "child.start(); child.join(30); print(child.exitcode)\n"
    )
    assert host.run(script, fails=True).out == "0\n"


# STRICT


@pytest.fixture
def drifted(host):
    """A host whose source is not the recorded one, so that STRICT has something to refuse."""
    host.patches(DEMO)
    host.write("vllm.ops", DRIFTED)
    return host


TWICE = """
try:
    import vllm
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.fault("strict_is_bypassed")
@pytest.mark.parametrize("strict", ["1", "0"])
def test_ctrl_c_during_the_decision_leaves_it_to_the_second_import(drifted, strict):
    fault = (
        "from ascend_patch import _plan\n"
        "plan, calls = _plan.plan, []\n"
        "def interrupted(*a, **k):\n"
        "    if not calls:\n        calls.append(1); raise KeyboardInterrupt\n"
        "    return plan(*a, **k)\n"
        "_plan.plan = interrupted\n"
    )
    found = drifted.run(fault + TWICE + SERVE, fails=True, ASCEND_PATCHES_STRICT=strict)
    if strict == "1":
        assert (found.code, found.out) == (1, "KeyboardInterrupt\n")
        assert "ASCEND_PATCHES_STRICT=1 and patch demo is skipped" in found.err
    else:
        assert (found.code, found.out) == (0, f"KeyboardInterrupt\n{UNPATCHED}")


@pytest.mark.fault("strict_is_bypassed")
def test_after_ctrl_c_the_second_import_is_patched(host):
    host.patches(DEMO)
    fault = (
        "from ascend_patch import _hooks\n"
        "install, calls = _hooks.install, []\n"
        "def interrupted(*a, **k):\n"
        "    install(*a, **k)\n"
        "    if not calls:\n        calls.append(1); raise KeyboardInterrupt\n"
        "_hooks.install = interrupted\n"
    )
    found = host.run(fault + TWICE + SERVE, fails=True)
    assert (found.code, found.out) == (0, f"KeyboardInterrupt\n{PATCHED}")
    assert found.patch("demo")["state"] == "applied"


@pytest.mark.fault("strict_is_bypassed")
@pytest.mark.parametrize(
    "fault",
    [
        "from ascend_patch import _rundir\n_rundir.enter = lambda: 1 / 0\n",
        "from ascend_patch import _state\n_state.ProcessState.write = lambda self: 1 / 0\n",
        "from ascend_patch import _finder\n_finder.Finder._stand_in = lambda *_: 1 / 0\n",
        "import os\nos.environ.clear()\n",
        "import sys\nsys.modules['ascend_patch._plan'] = None\n",
        "import sys\nsys.modules['ascend_patch._runtime'] = None\n",
    ],
    ids=["run directory", "status file", "finder", "environment", "planner", "runtime"],
)
def test_strict_holds_whatever_else_fails(drifted, fault):
    twice = TWICE + "import vllm\nprint('it started')\n"
    found = drifted.run(fault + twice, fails=True, ASCEND_PATCHES_STRICT="1")
    assert (found.code, found.out) == (1, "Refusal\n")
    assert "ASCEND_PATCHES_STRICT=1 and " in found.err


DEEP = """
import json, os, sys
limit = sys.getrecursionlimit()
def descend(frames):
    if frames:
        return descend(frames - 1)
    import vllm.ops
    return vllm.ops.f(1)[0]
found = {}
for frames in range(limit - 150, limit, 3):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            out = descend(frames)
        except BaseException as error:
            out = type(error).__name__
        os.write(write, out.encode()); os._exit(0)
    os.wait(); found[frames] = os.read(read, 99).decode()
print(json.dumps(found))
"""


@pytest.mark.fault("strict_is_bypassed")
def test_from_a_deep_stack_strict_is_never_unpatched(host):
    host.patches(DEMO)
    # All that is imported is loaded, so that it is the decision that has no room.
    load = "import wrapt, ascend_patch._runtime, ascend_patch._apply, ascend_patch._hooks\n"
    found = host.run(load + DEEP, fails=True, ASCEND_PATCHES_STRICT="1").value
    assert "f" not in found.values(), found
    assert {"ours", "RecursionError"} <= set(found.values()), "the depths show nothing"


@pytest.mark.fault("shim_error_ends_import")
def test_from_a_deep_stack_the_host_is_imported_where_it_would_be_without_the_shim(host):
    host.patches(DEMO)
    without = host.run(DEEP, ASCEND_PATCHES="").value
    found = host.run(DEEP, fails=True).value
    # An import hook takes frames of its own: its find_spec and exec_module, around the host's.
    ours = 6
    deepest = max(int(frames) for frames, out in without.items() if out == "f")
    lost = {f: out for f, out in found.items() if int(f) <= deepest - ours and out.endswith("or")}
    assert lost == {}


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> tuple[Path, list[str]]:
    """A copy of the shim to break, and its modules that a process which imports vLLM loads."""
    folder = tmp_path_factory.mktemp("shim")
    shutil.copytree(REPOSITORY / "ascend_patch", folder / "ascend_patch", symlinks=True)
    shutil.copy(REPOSITORY / "sitecustomize.py", folder)
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("__version__ = '0.18.0'\n")
    listing = (
        "import vllm, sys; print('\\n'.join(n for n in sys.modules if n.startswith('ascend_patch.')"
        " and n.count('.') == 1 and n.split('.')[1].startswith('_')))"
    )
    done = start(folder, listing)
    found = done.stdout.split()
    assert len(found) > 15, done.stderr
    return folder, found


def start(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "ASCEND_PATCHES": "all",
            "ASCEND_PATCHES_STATUS_DIR": str(folder / "status"),
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


BROKEN = ("raise RuntimeError('broken')\n", "def\n", "import sys; sys.exit(3)\n")


@pytest.mark.fault("strict_is_bypassed")
@pytest.mark.fault("shim_error_ends_import")
def test_strict_holds_whichever_file_of_the_shim_is_broken(modules):
    folder, names = modules
    bypassed, ended = [], []
    for index, name in enumerate(sorted(names)):
        if name == "ascend_patch._bootstrap":
            continue  # the one that decides; Python says that it is broken
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        whole = path.read_text()
        path.write_text(
            ("raise RuntimeError('broken')\n", "def\n", "import sys; sys.exit(3)\n")[index % 3]
        )
        try:
            code = "print('start'); import vllm; print(vllm.__version__)"
            strict = start(folder, code, ASCEND_PATCHES_STRICT="1")
            if (strict.returncode, strict.stdout) != (
                1,
                "start\n",
            ) or "STRICT" not in strict.stderr:
                bypassed.append((name, strict.returncode, strict.stdout, strict.stderr[-300:]))
            open_ = start(folder, code)
            if (open_.returncode, open_.stdout) != (0, "start\n0.18.0\n"):
                ended.append((name, open_.returncode, open_.stderr[-300:]))
        finally:
            path.write_text(whole)
    assert bypassed == []
    assert ended == []


# One reader for all switches

YES, NO = ["1", "true", "True", "YES", " on ", "ON"], ["0", "False", "no", "OFF", "", "  "]
NEITHER = [
    "2",
    "maybe",
    "y",
    "-1",
    "none",
    "1,0",
    "\u0661",
    "true\udcff",
    "'; import os",
    "x" * 3000,
]
SWITCHES = ("ASCEND_PATCHES_STRICT", "ASCEND_PATCHES_SELFTEST", "ASCEND_PATCHES_CHECK")


@pytest.mark.fault("switch_values")
@pytest.mark.parametrize("value", [*YES, *NO])
def test_strict_is_on_or_off_in_any_case(drifted, value):
    found = drifted.run("import vllm\nprint('it started')", fails=True, ASCEND_PATCHES_STRICT=value)
    assert (found.code, found.out) == ((1, "") if value in YES else (0, "it started\n"))


@pytest.mark.fault("switch_values")
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_that_cannot_be_read_is_an_error_where_vllm_is_imported(host, name):
    host.patches(DEMO)
    for value in NEITHER:
        plain = host.run("print('fine')", **{name: value})
        assert (plain.code, plain.out, plain.err) == (0, "fine\n", ""), value
        found = host.run("import vllm\nprint('it started')", fails=True, **{name: value})
        assert (found.code, found.out) == (1, ""), value
        sentence = found.err.removesuffix("\n")
        assert sentence.startswith(f"ascend-patch: {name}="), value
        assert "1 or true or yes or on" in sentence
        assert len(sentence) < 500
        assert sentence.isprintable()


# Selections


@pytest.mark.fault("only_exclusions")
def test_only_exclusions_mean_all_but_those(host):
    host.patches(
        f'{DEMO}, patch("more", target("vllm.more:g")), patch("user", target("vllm.user:call"))'
    )
    for value, left in (("-more", ["demo", "user"]), ("-more, -Patch_User", ["demo"])):
        script = "import vllm, ascend_patch, json\n" + (
            "print(json.dumps([p['id'] for p in ascend_patch.status()['patches']]))\n"
        )
        assert host.run(script, ASCEND_PATCHES=value).value == left
    found = host.run("import vllm", fails=True, ASCEND_PATCHES="-mroe")
    assert found.code == 1
    assert "Did you mean `more`?" in found.err


@pytest.mark.fault("unknown_patch_name")
def test_an_unknown_name_stops_vllm_as_the_readme_says_and_no_other_process(host):
    host.patches(DEMO)
    plain = host.run("print('fine')", ASCEND_PATCHES="dmeo")
    assert (plain.out, plain.err, plain.states) == ("fine\n", "", [])
    found = host.run("import vllm\nprint('it started')", fails=True, ASCEND_PATCHES="dmeo")
    assert (found.code, found.out) == (1, "")
    assert "names out of: demo" in found.err
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `rotray`.*$", readme, re.MULTILINE)
    assert "imports vLLM stops" in row
    assert "other Python processes" in row


# Threads

SLOW_LOADER = """
import importlib.machinery, json, sys, threading
class Spec(importlib.machinery.ModuleSpec):
    # importlib reads the loader once more between `sys.modules[name] = module` and exec_module.
    @property
    def loader(self):
        if self.name == "vllm" and "vllm" in sys.modules and not other.ident:
            other.start(); other.join(2)
        return vars(self)["own"]
    @loader.setter
    def loader(self, loader):
        vars(self)["own"] = loader
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            found = importlib.machinery.PathFinder.find_spec(name, path)
            spec = Spec(name, found.loader, origin=found.origin, is_package=True)
            spec.submodule_search_locations = found.submodule_search_locations
            spec.has_location = True
            return spec
def work():
    import vllm.ops
    seen.append(vllm.ops.f(1)[0])
seen, other = [], threading.Thread(target=work)
sys.meta_path.insert(1, Finder())
import vllm
other.join(30)
import vllm.ops
print(json.dumps([seen, vllm.ops.f(1)[0], other.ident is not None]))
"""


@pytest.mark.fault("submodule_before_decision")
def test_a_thread_between_sys_modules_and_the_gate_gets_a_patched_submodule(host):
    host.patches(DEMO)
    found = host.run(SLOW_LOADER)
    assert found.value == [["ours"], "ours", True]
    assert found.patch("demo")["notes"] == []


FIFTY = """
import importlib, json, os, sys, threading
sys.setswitchinterval(1e-6)
import wrapt, ascend_patch._runtime, ascend_patch._apply
results = []
for _ in range(ROUNDS):
    read, write = os.pipe()
    if os.fork() == 0:
        seen, start = [], threading.Barrier(50)
        def work(i):
            start.wait(30)
            if i % 2:
                import vllm
            else:
                import vllm.ops
                seen.append(vllm.ops.f(1)[0])
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(50)]
        [t.start() for t in threads], [t.join(30) for t in threads]
        os.write(write, json.dumps(seen).encode()); os._exit(0)
    os.wait(); results.append(json.loads(os.read(read, 9999)))
print(json.dumps(results))
"""


def test_fifty_threads_get_patched_submodules(host):
    host.patches(DEMO)
    found = host.run(FIFTY.replace("ROUNDS", "20")).value
    assert found == [["ours"] * 25] * 20


@pytest.mark.fault("strict_is_bypassed")
def test_a_thread_that_waits_for_a_refusal_is_refused_too(drifted):
    script = (
        "import json, sys, threading, time\n"
        "from ascend_patch import _plan\n"
        "plan, begun, out = _plan.plan, threading.Event(), []\n"
        "def slow(*a, **k):\n    begun.set(); time.sleep(0.5); return plan(*a, **k)\n"
        "_plan.plan = slow\n"
        "def work(name):\n"
        "    try:\n        __import__(name); out.append(name)\n"
        "    except BaseException as error:\n        out.append(type(error).__name__)\n"
        "first = threading.Thread(target=work, args=('vllm',)); first.start(); begun.wait(20)\n"
        "second = threading.Thread(target=work, args=('vllm.ops',)); second.start()\n"
        "first.join(30), second.join(30)\n"
        "print(json.dumps([out, 'vllm.ops' in sys.modules]))\n"
    )
    found = drifted.run(script, fails=True, ASCEND_PATCHES_STRICT="1")
    assert found.value == [["Refusal", "Refusal"], False]


CROSSED = """
import faulthandler, importlib.machinery, sys, threading
faulthandler.dump_traceback_later(20, exit=True)
inside, held = threading.Event(), threading.Event()
sys.inside = inside
class Loader(importlib.machinery.SourceFileLoader):
    def create_module(self, spec):
        held.set()  # by now this thread holds the import lock of vllm_ascend
        assert inside.wait(15)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("vllm.ops", "vllm_ascend"):
            found = importlib.machinery.PathFinder.find_spec(name, path)
            if name == "vllm_ascend":
                found.loader = Loader(name, found.origin)
            return found
import vllm
import ascend_patch._runtime as runtime
# vllm.ops comes in past the shim's finder, vllm_ascend through it.
sys.meta_path.insert(0, Finder())
import vllm.ops
ours = sys.meta_path.pop(1)
sys.meta_path.insert(0, ours)
other = threading.Thread(target=__import__, args=("vllm_ascend",))
other.start()
assert held.wait(15)
runtime.current().look_again()
other.join()
print(vllm.ops.f(1)[0])
"""


@pytest.mark.fault("lock_held_across_imports")
def test_attaching_late_does_not_wait_for_an_import_that_waits_for_it(host):
    host.patches('patch("demo", target("vllm.ops:f", replacement="crossed:outer"))')
    host.write("vllm_ascend", "")
    host.write(
        "crossed",
        "import sys\nsys.inside.set()\nimport vllm_ascend\nfrom replacements import outer\n",
    )
    found = host.run(CROSSED, fails=True)
    assert found.code == 0, f"a deadlock: {found.err}"
    assert found.out == "ours\n"


LATE_CROSSED = """
import faulthandler, importlib.machinery, sys, threading
faulthandler.dump_traceback_later(20, exit=True)
inside, held = threading.Event(), threading.Event()
sys.inside = inside
class Loader(importlib.machinery.SourceFileLoader):
    def create_module(self, spec):
        held.set()
        assert inside.wait(15)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm_ascend":
            found = importlib.machinery.PathFinder.find_spec(name, path)
            found.loader = Loader(name, found.origin)
            return found
from ascend_patch import _bootstrap, _finder, _plugin
# Somebody takes the finder out, vLLM is imported, and the plugin puts the finder back.
sys.meta_path[:] = [f for f in sys.meta_path if f is not _bootstrap.finder()]
import vllm.ops
sys.meta_path.insert(0, Finder())
other = threading.Thread(target=__import__, args=("vllm_ascend",))
arm = _finder.Finder.arm
def arm_and_wait(finder):
    arm(finder)
    if not other.ident:
        other.start(); assert held.wait(15)
_finder.Finder.arm = arm_and_wait
_plugin.load()
other.join()
print(vllm.ops.f(1)[0])
"""


@pytest.mark.fault("lock_held_across_imports")
def test_deciding_late_does_not_wait_for_an_import_that_waits_for_the_decision(host):
    host.patches('patch("demo", target("vllm.ops:f", replacement="crossed:outer"))')
    host.write("vllm_ascend", "")
    host.write(
        "crossed",
        "import sys\nsys.inside.set()\nimport vllm_ascend\nfrom replacements import outer\n",
    )
    found = host.run(LATE_CROSSED, fails=True)
    assert found.code == 0, f"a deadlock: {found.err}"
    assert found.out == "ours\n"


# Logging


@pytest.mark.fault("warnings_vanish_in_engine")
def test_every_logger_of_the_shim_belongs_to_vllms_tree():
    found, seen = [], 0
    for path in [*REPOSITORY.glob("ascend_patch/**/*.py"), *REPOSITORY.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("getLogger", "getChild"):
                seen += 1
                if path.name != "_log.py":
                    found.append(f"{path}:{node.lineno}")
    assert found == []
    assert seen, "the helper is gone, and this test with it"


@pytest.mark.fault("warnings_vanish_in_engine")
def test_a_warning_is_seen_where_the_root_logger_is_at_error(capfd):
    pytest.importorskip("torch", reason="torch is not installed here")
    script = (
        "import logging, sys\n"
        # As vLLM configures its workers: a handler on `vllm`, nothing of anybody else.
        "logging.getLogger().setLevel(logging.ERROR)\n"
        "vllm = logging.getLogger('vllm'); vllm.setLevel(logging.INFO); vllm.propagate = False\n"
        "vllm.addHandler(logging.StreamHandler(sys.stdout))\n"
        "from ascend_patch.kernels import dispatch\n"
        "dispatch.logger.warning('a sentence')\n"
        "no = dispatch.Implementation('none', print, lambda: (False, 'not this one'))\n"
        "dispatch.register('op', 'cpu', no)\n"
        "dispatch.select('op', 'cpu')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "a sentence" in done.stdout
    assert "not this one" in done.stdout
