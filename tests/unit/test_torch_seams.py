"""Traced and operator seams under the real torch.compile and dispatcher."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest

from ascend_patch._registry import Target

torch = pytest.importorskip("torch", reason="torch is not installed")
FACTOR = 3.0


@pytest.fixture
def module(site):
    """A host with a layer whose forward calls a function, and ours, which scales it visibly."""
    site.write(
        "ap_m", "def scale(x):\n    return x * 2\n\ndef forward(x):\n    return scale(x) + 1\n"
    )
    ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
    ours.traced = lambda original: lambda x: original(x) * FACTOR
    ours.host = lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) * FACTOR
    torch._dynamo.reset()
    yield importlib.import_module("ap_m")
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)


def test_a_traced_seam_is_the_same_eager_and_compiled(bench, module):
    x = torch.randn(4)
    bench.arm(Target("ap_m:scale", "traced", "ap_ours:traced"))
    expected = x * 2 * FACTOR + 1
    torch.testing.assert_close(module.forward(x), expected)
    torch.testing.assert_close(compiled(module.forward)(x), expected)


def test_a_compiled_function_gives_the_original_after_a_revert(bench, module):
    x = torch.randn(4)
    bench.arm(Target("ap_m:scale", "traced", "ap_ours:traced"))
    forward = compiled(module.forward)
    torch.testing.assert_close(forward(x), x * 2 * FACTOR + 1)
    bench.applier.revert("demo")
    torch.testing.assert_close(forward(x), x * 2 + 1)


def test_a_compiled_caller_that_kept_ours_gives_the_original_after_a_revert(bench, module):
    x = torch.randn(4)
    bench.arm(Target("ap_m:scale", "traced", "ap_ours:traced"))
    kept = compiled(module.scale)
    torch.testing.assert_close(kept(x), x * 2 * FACTOR)
    bench.applier.revert("demo")
    torch.testing.assert_close(kept(x), x * 2)


def test_a_compiled_call_is_not_counted(bench, module):
    bench.arm(Target("ap_m:scale", "traced", "ap_ours:traced"))
    compiled(module.forward)(torch.randn(4))
    assert bench.state.counters.value("demo/ap_m:scale") == 0
    module.forward(torch.randn(4))
    assert bench.state.counters.value("demo/ap_m:scale") == 1


def test_a_wrapt_wrapper_is_bypassed_by_torch_compile(bench, module):
    """Why traced seams are plain functions: should torch change this, rule 7 can be relaxed."""
    x = torch.randn(4)
    bench.arm(Target("ap_m:scale", "host", "ap_ours:host"))
    torch.testing.assert_close(module.forward(x), x * 2 * FACTOR + 1)
    found = torch.compile(module.forward, backend="eager")(x)
    torch.testing.assert_close(found, x * 2 + 1)


# Operator seams

KEYS = {"cpu": "CPU", "any device, by redispatch": "CompositeExplicitAutograd"}


@pytest.fixture
def operator(request, site):
    """A host that registers `ap_ops::scale` for the CPU, and ours, which scales it visibly."""
    site.write("ap_m", "def scale(x):\n    return x * 2\n")
    host = importlib.import_module("ap_m")
    key = getattr(request, "param", "CPU")
    library = torch.library.Library("ap_ops", "FRAGMENT")
    library.define("scale(Tensor x) -> Tensor")
    library.impl("scale", host.scale, key)
    library.impl("scale", lambda x: torch.empty_like(x), "Meta")
    ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
    ours.traced = lambda original: lambda x: original(x) * FACTOR
    ours.other = lambda original: lambda x, y: original(x)
    torch._dynamo.reset()
    yield Target(
        "ap_m:scale", "operator", "ap_ours:traced", operator="ap_ops::scale", dispatch_key=key
    )
    library._destroy()
    torch._dynamo.reset()


@pytest.mark.parametrize("operator", KEYS.values(), ids=KEYS, indirect=True)
def test_an_operator_is_re_implemented_and_given_back(bench, operator):
    x = torch.randn(4)
    call = lambda x: torch.ops.ap_ops.scale(x) + 1  # noqa: E731
    bench.arm(operator)
    torch.testing.assert_close(call(x), x * 2 * FACTOR + 1)
    torch.testing.assert_close(compiled(call)(x), x * 2 * FACTOR + 1)
    bench.applier.revert("demo")
    torch.testing.assert_close(call(x), x * 2 + 1)
    torch.testing.assert_close(compiled(call)(x), x * 2 + 1)
    bench.applier.apply_again("demo", sys.modules)
    torch.testing.assert_close(call(x), x * 2 * FACTOR + 1)
    bench.applier.revert("demo")


def test_an_operator_of_another_dispatch_key_runs_ours_after_a_redispatch(bench, site):
    """PrivateUse1 is where an NPU's kernels are: reached here without an NPU."""
    site.write("ap_m", "def scale(x):\n    return x * 2\n")
    host = importlib.import_module("ap_m")
    library = torch.library.Library("ap_npu", "FRAGMENT")
    library.define("scale(Tensor x) -> Tensor")
    library.impl("scale", host.scale, "PrivateUse1")
    npu = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    library.impl("scale", lambda x: torch.ops.ap_npu.scale.default.redispatch(npu, x), "CPU")
    ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
    ours.traced = lambda original: lambda x: original(x) * FACTOR
    x = torch.randn(4)
    try:
        bench.arm(Target("ap_m:scale", "operator", "ap_ours:traced", operator="ap_npu::scale"))
        torch.testing.assert_close(torch.ops.ap_npu.scale(x), x * 2 * FACTOR)
        bench.applier.revert("demo")
        torch.testing.assert_close(torch.ops.ap_npu.scale(x), x * 2)
    finally:
        library._destroy()


def test_a_reload_of_the_host_leaves_one_layer_on_the_operator(bench, operator):
    x = torch.randn(4)
    bench.arm(operator)
    importlib.reload(sys.modules["ap_m"])
    torch.testing.assert_close(torch.ops.ap_ops.scale(x), x * 2 * FACTOR)
    bench.applier.revert("demo")
    torch.testing.assert_close(torch.ops.ap_ops.scale(x), x * 2)


def test_the_host_can_register_again_after_a_revert(bench, operator):
    bench.arm(operator)
    bench.applier.revert("demo")
    again = torch.library.Library("ap_ops", "IMPL")
    again.impl("scale", lambda x: x * 5, "CPU", allow_override=True)
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 5.0))
    again._destroy()


@pytest.mark.parametrize("operator", KEYS.values(), ids=KEYS, indirect=True)
def test_an_operator_that_somebody_registers_after_us_is_hidden(bench, operator):
    patch = bench.arm(operator)
    assert bench.applier.check() == []
    theirs = torch.library.Library("ap_ops", "IMPL")
    theirs.impl("scale", lambda x: x * 5, operator.dispatch_key, allow_override=True)
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 5.0))
    (said,) = bench.applier.check()
    assert f"replaced by a kernel of {__file__}:" in said
    assert said.endswith("that is in force and ours does not run: leave one of the two out")
    assert patch.targets[0].state == "hidden"
    theirs._destroy()
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 6.0))
    assert bench.applier.check() == []
    assert patch.targets[0].state == "applied"
    bench.applier.revert("demo")
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 2.0))


@pytest.mark.expects_failure
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operator": "ap_ops::nothing"}, "the operator ap_ops::nothing is not registered"),
        ({"replacement": "ap_ours:other"}, "scale takes (x), our replacement takes (x, y)"),
    ],
)
def test_what_cannot_be_re_implemented_is_refused(bench, operator, change, reason):
    values = {name: getattr(operator, name) for name in operator.__dataclass_fields__}
    patch = bench.arm(Target(**{**values, **change}))
    assert reason in patch.reason
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 2.0))


def test_allow_override_is_given_whatever_its_default(bench, operator, monkeypatch):
    given = []
    impl = torch.library.Library.impl

    def recording(self, op_name, fn, dispatch_key="", *, with_keyset=False, allow_override=False):
        given.append(allow_override)
        return impl(self, op_name, fn, dispatch_key, allow_override=allow_override)

    monkeypatch.setattr(torch.library.Library, "impl", recording)
    bench.arm(operator)
    assert given == [True]
    torch.testing.assert_close(torch.ops.ap_ops.scale(torch.ones(1)), torch.full((1,), 6.0))
    bench.applier.revert("demo")


@pytest.mark.expects_failure
def test_a_torch_that_cannot_override_is_a_sentence(bench, operator, monkeypatch):
    def impl(self, op_name, fn, dispatch_key=""):
        raise AssertionError("it was called")

    assert "allow_override" not in inspect.signature(impl).parameters
    monkeypatch.setattr(torch.library.Library, "impl", impl)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    patch = bench.arm(operator)
    assert patch.state == "failed"
    assert "torch 2.6.0+cu124 cannot override an operator; 2.7 or later can" in patch.reason
