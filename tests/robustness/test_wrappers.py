"""Wrapped targets beside other code: they are copied, pickled and wrapped as without the shim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import fakehost
import pytest

COPIES = """
import copy, inspect, json, pickle, sys
import vllm.ops
from vllm.ops import Layer, f
try:
    import cloudpickle
except ModuleNotFoundError:
    cloudpickle = None

class Holder:
    pass

layer = Layer()
layer.method = layer.forward          # as vLLM's layers keep `_forward_method`
things = {
    "function": f, "method of the class": Layer.forward, "bound": layer.forward,
    "class method": Layer.build, "bound class method": layer.build,
    "static method": Layer.static, "static by instance": layer.static, "holder": layer,
}
ways = {"copy": copy.copy, "deepcopy": copy.deepcopy}
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    ways[f"pickle {protocol}"] = lambda x, p=protocol: pickle.loads(pickle.dumps(x, p))
if cloudpickle is not None:
    ways["cloudpickle"] = lambda x: cloudpickle.loads(cloudpickle.dumps(x))
found = {}
for name, thing in things.items():
    for way, make in ways.items():
        try:
            made = make(thing)
        except Exception as error:
            found[f"{name}, {way}"] = f"{type(error).__name__}: {error}"
            continue
        if name == "holder":
            own = made.method.__self__ is (layer if way == "copy" else made)
            found[f"{name}, {way}"] = [own, made.method(1)]
        else:
            same = made is thing
            arguments = (layer, 1) if name == "method of the class" else (1,)
            found[f"{name}, {way}"] = [same, made(*arguments)]
dumps = [pickle.dumps(thing) for thing in things.values()]
def local():
    def inner(x):
        return x
    return inner
try:
    pickle.dumps(local())
    found["local"] = "pickled"
except Exception as error:
    found["local"] = type(error).__name__
found["signatures"] = [str(inspect.signature(t)) for t in list(things.values())[:-1]]
found["kinds"] = [[inspect.isfunction(t), inspect.ismethod(t)] for t in list(things.values())[:-1]]
found["identity"] = [Layer.forward is Layer.forward, layer.static is Layer.static]
found["shim in a pickle"] = any(b"ascend_patch" in d or b"wrapt" in d for d in dumps)
found["dumps"] = [d.hex() for d in dumps[:-1]]
print(json.dumps(found))
"""
SOURCE = """
class Layer:
    def forward(self, x):
        return ["forward", x]
    @classmethod
    def build(cls, x):
        return [cls.__name__, x]
    @staticmethod
    def static(x):
        return ["static", x]
def f(x):
    return ["f", x]
"""
PATCHES = """
patch("demo", *(target(f"vllm.ops:{name}") for name in (
    "f", "Layer.forward", "Layer.build", "Layer.static"
)), host="vllm", versions="")
"""


@pytest.fixture
def copies(host, monkeypatch):
    """What copies and pickles of targets are, without the shim and with it."""
    monkeypatch.setitem(fakehost.SOURCES, "vllm.ops", SOURCE)
    host.write("vllm.ops", SOURCE)
    host.record()
    host.patches(PATCHES)

    def run(**environment: str):
        return host.run(COPIES, **environment)

    return run


@pytest.mark.fault("wrapped_targets_copy_and_pickle")
def test_targets_are_copied_and_pickled_as_without_the_shim(copies):
    plain = copies(ASCEND_PATCHES="off").value
    outcome = copies()
    patched = outcome.value
    assert outcome.patch("demo")["state"] == "applied"
    assert not patched.pop("shim in a pickle")
    plain.pop("shim in a pickle")

    def without_ours(value):
        return (
            [value[0], value[1][1:]] if isinstance(value, list) and value[1][0] == "ours" else value
        )

    calls = [name for name, value in patched.items() if ", " in name]
    assert len(calls) >= 8 * 8
    # The control: a copy runs what it is a copy of.
    wrong = {
        n: patched[n]
        for n in calls
        if not isinstance(patched[n], list) or patched[n][1][0] != "ours"
    }
    assert not wrong
    assert {n: without_ours(patched[n]) for n in calls} == {n: plain[n] for n in calls}
    rest = ["local", "signatures", "kinds", "identity", "dumps"]
    assert {n: patched[n] for n in rest} == {n: plain[n] for n in rest}


@pytest.mark.fault("wrapped_targets_copy_and_pickle")
def test_what_a_patched_process_pickled_is_read_without_the_shim(copies, host):
    dumps = copies().value["dumps"]
    script = (
        "import json, pickle, vllm.ops\n"
        f"found = [pickle.loads(bytes.fromhex(d)) for d in {dumps!r}]\n"
        "print(json.dumps([getattr(x, '__qualname__', '?') for x in found]))\n"
    )
    read = host.run(script, ASCEND_PATCHES="off").value
    assert read == [
        "f",
        "Layer.forward",
        "Layer.forward",
        *["Layer.build"] * 2,
        *["Layer.static"] * 2,
    ]


def without_wraps(impl):
    def called(*args, **kwargs):
        return impl(*args, **kwargs)

    return called


def with_its_own_keywords(impl):
    def called(self, op_name, fn, dispatch_key="", *, with_keyset=False):
        return impl(self, op_name, fn, dispatch_key, with_keyset=with_keyset)

    return called


def twice(impl):
    return with_its_own_keywords(without_wraps(impl))


@pytest.mark.fault("library_impl_without_wraps")
@pytest.mark.parametrize("wrapper", [None, without_wraps, with_its_own_keywords, twice])
def test_a_wrapped_library_impl_is_no_reason_to_roll_back(monkeypatch, wrapper):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ascend_patch._operator_seam import OperatorInstallation
    from ascend_patch._registry import Target

    host = types.ModuleType("ap_robust_host")
    exec("def scale(x):\n    return x * 2\n", host.__dict__)
    ours = types.ModuleType("ap_robust_ours")
    ours.traced = lambda original: lambda x: original(x) * 3
    monkeypatch.setitem(sys.modules, host.__name__, host)
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    name = f"ap_robust_{os.getpid()}_{getattr(wrapper, '__name__', 'none')}"
    library = torch.library.Library(name, "FRAGMENT")
    library.define("scale(Tensor x) -> Tensor")
    library.impl("scale", host.scale, "CPU")
    if wrapper is not None:
        wrapped = wrapper(torch.library.Library.impl)
        monkeypatch.setattr(torch.library.Library, "impl", wrapped)
    installation = OperatorInstallation(
        Target(
            "ap_robust_host:scale",
            "operator",
            "ap_robust_ours:traced",
            operator=f"{name}::scale",
            dispatch_key="CPU",
        ),
        lambda: None,
    )
    operator = getattr(torch.ops, name).scale
    try:
        installation.prepare()
        installation.install()
        assert operator(torch.ones(1)).item() == 6
        installation.revert()
        assert operator(torch.ones(1)).item() == 2
    finally:
        library._destroy()


def test_a_wrapper_that_hides_torchs_own_is_named(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ascend_patch import _operator_seam
    from ascend_patch._replacement import SeamError

    def impl(self, op_name, fn, dispatch_key=""):
        raise AssertionError("it was called")

    monkeypatch.setattr(torch.library.Library, "impl", impl)
    with pytest.raises(SeamError) as refused:
        _operator_seam._impl_that_overrides()
    assert "is wrapped by impl in" in str(refused.value)
    assert "cannot override" not in str(refused.value)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(SeamError, match=r"torch 2\.6\.0\+cpu cannot override"):
        _operator_seam._impl_that_overrides()


# What Huawei's msserviceprofiler 1.2.3 does: its finder comes first, and asks PathFinder alone.
AHEAD = """
import importlib.machinery, json, sys
import vllm
class Profiler:
    def find_spec(self, name, path=None, target=None):
        if name == TARGET:
            return importlib.machinery.PathFinder.find_spec(name, path, target)
"""
LATE = """
TARGET = "vllm.ops"
INSTALL
import vllm.ops
class Module:
    def __init__(self, *layers):
        self.layers = layers
    def named_modules(self):
        return [(f"layers.{n}", layer) for n, layer in enumerate(self.layers)]
class Built(vllm.ops.Layer):
    def __init__(self):
        self._forward_method = self.forward
    def __call__(self, x):
        return self._forward_method(x)
built = [Built(), Built()]
from ascend_patch import _runtime
runtime = _runtime.current()
model = Module(*built, vllm.ops.Layer())
runtime.model_is_loaded(model)
after = Built()
print(json.dumps([built[0](1), after(1), vllm.ops.Layer().forward(1)]))
"""


@pytest.mark.fault("late_target_reads_applied")
@pytest.mark.parametrize("seam", ["host", "traced"])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_target_that_came_after_layers_were_built_says_so(host, seam, ahead):
    replacement = "outer" if seam == "host" else "method_factory"
    host.patches(
        f'patch("demo", target("vllm.ops:Layer.forward", "{seam}", "replacements:{replacement}"))'
    )
    install = "sys.meta_path.insert(0, Profiler())" if ahead else ""
    found = host.run(AHEAD + LATE.replace("INSTALL", install))
    (target,) = found.patch("demo")["targets"]
    ours, original = ["ours", "forward", 1], ["forward", 1]
    if not ahead:
        assert found.value == [ours] * 3
        assert (target["state"], target["reason"]) == ("applied", "")
        return
    assert found.value == [original, ours, ours]
    assert target["state"] == "hidden", target
    for part in (
        "applied late: vllm.ops had been imported before, by a finder of __main__",
        "layers.0._forward_method and 1 more keep the original",
        "restart",
    ):
        assert part in target["reason"], target["reason"]
    refused = host.run(
        AHEAD + LATE.replace("INSTALL", install), fails=True, ASCEND_PATCHES_STRICT="1"
    )
    assert refused.code == 1
    assert "keep the original" in refused.err


REAL = """
import json, sys
import torch
TARGET = "vllm.model_executor.layers.rotary_embedding.base"
if sys.argv[1] == "ahead":
    sys.meta_path.insert(0, Profiler())
from vllm.config import VllmConfig, set_current_vllm_config
with set_current_vllm_config(VllmConfig()):
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    layer = RotaryEmbedding(64, 64, 32, 10000.0, True, torch.float32)
from ascend_patch import _runtime
runtime = _runtime.current()
runtime.model_is_loaded(torch.nn.Sequential(layer))
patch = next(p for p in runtime.status()["patches"] if p["id"] == "rotary")
print("FOUND", json.dumps([t for t in patch["targets"] if "RotaryEmbedding.forward" in t["id"]]))
"""


@pytest.mark.fault("late_target_reads_applied")
def test_vllms_own_rotary_layer_that_was_built_before_is_counted(tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed")
    script = tmp_path / "script.py"
    script.write_text(AHEAD + REAL)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "PYTHONPATH"))}
    environment = {
        **kept,
        "PYTHONPATH": str(fakehost.REPOSITORY),
        "ASCEND_PATCHES": "rotary",
        "ASCEND_PATCHES_SELFTEST": "0",
        "ASCEND_PATCHES_STATUS_DIR": str(tmp_path / "status"),
    }
    done = subprocess.run(
        [sys.executable, str(script), "ahead"],
        env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    targets = json.loads(done.stdout.rpartition("FOUND ")[2])
    late = [t for t in targets if "keep the original" in t["reason"]]
    assert late, targets
    assert all(t["state"] == "hidden" and "0._forward_method" in t["reason"] for t in late)
