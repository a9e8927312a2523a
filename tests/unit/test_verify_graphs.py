"""Ours beside the original where torch.compile and device graphs are."""

from __future__ import annotations

import importlib
import types

import pytest

from ascend_patch._registry import Target

torch = pytest.importorskip("torch", reason="torch is not installed")

from verified_site import built, traced  # noqa: E402


@pytest.fixture
def there(site, bench):
    yield from built(site, bench)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_form_that_compares_is_traced_whole(there, backend):
    module = there.arm(traced("scale", "wrong"))
    x = torch.rand(4)
    forward = torch.compile(lambda x: module.both(x) + 1, backend=backend, fullgraph=True)
    with there.step():
        found = forward(x)
    torch.testing.assert_close(found, x * 3 + (x + 1) * 3 + 1)
    assert there.compared == 0
    assert there.verification.of("demo").compiled
    # Not counted either, as without the comparison.
    assert there.bench.state.counters.value("demo/ap_m:scale") == 0


def test_a_graph_with_ours_in_it_needs_a_restart(there):
    module = there.arm(traced("scale", "wrong"))
    x = torch.rand(4)
    torch.compile(module.both, backend="eager", fullgraph=True)(x)
    with there.step():
        assert torch.equal(module.scale(x), x * 2)
    assert there.patch.state == "failed"
    assert there.patch.reason.startswith("restart without it: ")


def test_a_captured_graph_needs_a_restart(there, monkeypatch):
    """As CUDA and torch_npu say it; there is no device here that captures."""
    capturing = [True]
    monkeypatch.setattr(
        torch, "cpu", types.SimpleNamespace(is_current_stream_capturing=lambda: capturing[0])
    )
    module = there.arm(traced("scale", "wrong"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.scale(x), x * 3)
        assert there.compared == 0
        capturing[0] = False
        assert torch.equal(module.scale(x), x * 2)
    assert there.patch.reason.startswith("restart without it: ")


def test_compiled_calls_of_an_operator_are_compared(there, site):
    """The body of an operator runs as Python in compiled graphs too."""
    site.write("ap_m", "def scale(x):\n    return x * 2\n")
    host = importlib.import_module("ap_m")
    library = torch.library.Library("ap_ops", "FRAGMENT")
    library.define("verified(Tensor x) -> Tensor")
    library.impl("verified", host.scale, "CPU")
    library.impl("verified", lambda x: torch.empty_like(x), "Meta")
    target = Target(
        "ap_m:scale", "operator", "ap_ours:wrong", operator="ap_ops::verified", dispatch_key="CPU"
    )
    try:
        there.arm(target)
        x = torch.rand(4)
        call = torch.compile(lambda x: torch.ops.ap_ops.verified(x) + 1, backend="eager")
        torch.testing.assert_close(call(x), x * 3 + 1)
        with there.step():
            torch.testing.assert_close(call(x), x * 2 + 1)
        # No graph holds ours: the next call goes through the dispatcher.
        assert there.patch.reason.startswith("verification: ap_ops::verified, call 1: ")
        torch.testing.assert_close(call(x), x * 2 + 1)
    finally:
        there.bench.applier.revert("demo")
        library._destroy()
