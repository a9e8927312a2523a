"""An exception at the entry of every function of the shim that runs while vLLM is imported."""

from __future__ import annotations

import pytest
from tally import tally

PATCHES = (
    'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"), target("vllm.more:g")),'
    ' patch("other", target("vllm.ops:Layer.forward"))'
)
# Where Python and vLLM enter the shim: a fault of these few lines themselves cannot be contained,
# since there is nothing around them. Each hands everything that it does to the guard.
ENTRIES = (
    "find_spec",
    "create_module",
    "exec_module",
    "tell",
    "__setattr__",
    "contain",
    "guarded",
    "get_model_loader",
    "load_and_tell",
    "model_is_loaded",
    "look_again",
    "load",
    "open_door",
    "<module>",
)
SCRIPT = """
import asyncio, json, os, random, signal, sys, time, traceback
import packaging.specifiers, wrapt
import ascend_patch, importlib.metadata
from ascend_patch import _apply, _hooks, _plan, _runtime, _selection, _selftest, _verify, _versions

SHIM = os.path.dirname(ascend_patch.__file__)
MODULES = ("vllm.user", "vllm.more", "vllm.model_executor.model_loader")

class Odd(BaseException):
    def __str__(self):
        raise ValueError("it cannot even be printed")

class Pretender(Exception):
    # An instance that has every attribute, and true.
    def __getattr__(self, name):
        return True

ERRORS = (RuntimeError, OSError, MemoryError, RecursionError, AttributeError, KeyError, ImportError,
          StopIteration, SystemExit, GeneratorExit, asyncio.CancelledError, Odd, Pretender)

class Injector:
    def __init__(self, at=0, error=None):
        self.at, self.error, self.seen = at, error, []

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(SHIM) or code.co_name in ENTRIES:
            return None
        self.seen.append(f"{os.path.basename(code.co_filename)}:{code.co_name}")
        if len(self.seen) == self.at:
            sys.settrace(None)
            raise self.error
        return None

def serve():
    import vllm.user, vllm.more
    from vllm.model_executor.model_loader import get_model_loader
    from ascend_patch import _plugin
    _plugin.load()
    get_model_loader().load_model()
    return [vllm.user.call(1)[0], vllm.more.g(1)[0], vllm.ops.Layer().forward(1)[0]]

def outcome(injector):
    out, first = None, ""
    sys.settrace(injector)
    for _ in range(3):
        try:
            out = serve()
            break
        except BaseException as error:
            where = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            first = first or f"{type(error).__name__} in {where}"
    sys.settrace(None)
    state = _runtime.current().state
    why = [*state.problems, *(p.reason for p in state.patches.values() if p.state != "applied")]
    why += [note for p in state.patches.values() for note in p.notes]
    return dict(out=out, first=first, why=why, seen=injector.seen if not injector.at else [])

def in_a_child(*arguments):
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(50)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(write, json.dumps(outcome(Injector(*arguments))).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.wait()
    return json.loads(text) if text else dict(out=None, first="it died", why=[])

whole = in_a_child()
places = {}
for number, name in enumerate(whole["seen"], 1):
    places.setdefault(name, []).append(number)
results = []
chance = random.Random(SEED)
begun = time.monotonic()
for name, numbers in chance.sample(sorted(places.items()), len(places)):
    if len(results) < MOST and time.monotonic() < begun + SECONDS:
        error = chance.choice([*ERRORS, *MORE])
        at = chance.choice(numbers)
        found = in_a_child(at, error("a fault was put here"))
        results.append(dict(found, place=name, at=at, error=error.__name__))
print(json.dumps(dict(whole=whole["out"], functions=len(places), results=results)))
"""
OURS = ["ours", "ours", "ours"]


def inject(host, seed, most, more="", **environment):
    """Functions of the shim, each failing in one call of it, with an exception drawn at random."""
    host.patches(PATCHES)
    given = f"SEED, MOST, SECONDS, ENTRIES, MORE = {seed}, {most}, 40, {ENTRIES!r}, [{more}]\n"
    found = host.run(f"{given}{SCRIPT}", fails=True, **environment)
    assert found.code == 0, found.err
    assert found.value["whole"] == OURS, "the control is not patched"
    assert found.value["functions"] > 100, "next to nothing of the shim was traced"
    assert len(found.value["results"]) > 20
    return found.value["results"]


# Everyday a sample, and every function in the slow run; in parts, for the time limit of a process.
AMOUNTS = [
    pytest.param(1, 60, id="some"),
    pytest.param(8, 300, id="all", marks=pytest.mark.slow),
]


@pytest.mark.fault("shim_error_ends_import")
@pytest.mark.parametrize(("runs", "most"), AMOUNTS)
def test_whichever_function_of_the_shim_fails_the_host_is_imported(host, seed, runs, most):
    results = [r for run in range(runs) for r in inject(host, seed + run, most)]
    ended = [(r["place"], r["error"], r["first"]) for r in results if r["first"]]
    assert ended == []
    # Unpatched, and the state does not say why.
    silent = [r for r in results if r["out"] != OURS and not r["why"]]
    assert silent == []
    patched = sum(r["out"] == OURS for r in results)
    tally(
        "start-up: an exception in each function of the shim",
        tried=len(results),
        unit="imports of a host",
        seed=seed,
        note=f"none ended, {patched} patched all the same",
    )


@pytest.mark.fault("strict_is_bypassed")
@pytest.mark.parametrize(("runs", "most"), AMOUNTS)
def test_whichever_function_of_the_shim_fails_strict_holds(host, seed, runs, most):
    more, strict = "KeyboardInterrupt, KeyboardInterrupt", {"ASCEND_PATCHES_STRICT": "1"}
    results = [r for run in range(runs) for r in inject(host, seed + run, most, more, **strict)]
    bypassed = [r for r in results if r["out"] not in (None, OURS)]
    assert bypassed == []
    assert any(r["out"] is None for r in results), "nothing was refused"
    tally(
        "start-up with STRICT: an exception or Ctrl-C in each function of the shim",
        tried=len(results),
        unit="imports of a host",
        seed=seed,
        note="none ran unpatched",
    )
