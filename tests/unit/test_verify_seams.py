"""Ours beside the original on real seams: eager, compiled, in place, and what a difference does."""

from __future__ import annotations

import importlib
import sys
import threading
import types

import pytest

from ascend_patch import _verify
from ascend_patch._apply import Applier
from ascend_patch._registry import Target
from ascend_patch._runtime import Refusal

torch = pytest.importorskip("torch", reason="torch is not installed")

SOURCE = """
def scale(x):
    return x * 2

def scale_(x):
    x *= 2

def both(x):
    return scale(x) + scale(x + 1)

class Layer:
    def forward(self, x, key=None):
        x *= 2
        return x, key
"""


class Site:
    """A patch on `ap_m`, compared; `ours` may be changed to be wrong."""

    def __init__(self, bench) -> None:
        self.bench = bench
        self.failed: list[tuple[str, str]] = []
        self.refuses = False

    def arm(self, *targets: Target, calls: int | None = None) -> types.ModuleType:
        bench = self.bench
        self.verification = _verify.Verification(
            {"demo": calls}, bench.state, self._fail, lambda: bench.applier.give_back()
        )
        bench.applier = Applier(bench.state, bench.finder, self.verification)
        bench.arm(*targets)
        return importlib.import_module("ap_m")

    def _fail(self, patch: str, reason: str) -> None:
        self.failed.append((patch, reason))
        self.bench.applier.condemn(patch, reason)
        if self.refuses:
            raise Refusal(reason)

    def step(self):
        return self.verification.step()

    @property
    def patch(self):
        return self.bench.state.patches["demo"]

    @property
    def compared(self) -> int:
        return self.verification.as_data()["demo"]["compared"]

    @property
    def found(self) -> dict:
        return self.verification.as_data()["demo"]


@pytest.fixture
def there(site, bench):
    site.write("ap_m", SOURCE)
    ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
    # Right, but not bit by bit, and wrong by half.
    ours.right = lambda original: lambda x: x + x * (1 + 2**-23)
    ours.wrong = lambda original: lambda x: x * 3
    ours.not_a_number = lambda original: lambda x: x * float("nan")
    ours.raises = lambda original: lambda x: 1 / 0
    ours.returns_it = lambda original: lambda x: x.mul_(2)

    def layer(original):
        return lambda self, x, key=None: (x * 2, key)

    def wrong_layer(original):
        return lambda self, x, key=None: (x * 3, key)

    def oracle(original):
        return lambda x: x * 3

    ours.layer, ours.wrong_layer, ours.oracle = layer, wrong_layer, oracle
    ours.host = lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs)
    ours.wrong_host = lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) + 1
    torch._dynamo.reset()
    yield Site(bench)
    torch._dynamo.reset()


def traced(name: str, ours: str, **more) -> Target:
    return Target(f"ap_m:{name}", "traced", f"ap_ours:{ours}", **more)


def test_what_agrees_is_compared_and_ours_is_returned(there):
    module = there.arm(traced("scale", "right"))
    x = torch.rand(2, 8)
    with there.step():
        found = module.scale(x)
    assert torch.equal(found, x + x * (1 + 2**-23))
    assert there.compared == 1
    assert 0 < there.found["error"] <= 4
    assert there.found["where"] == "ap_m:scale, call 1, result [2, 8] float32"
    assert (there.patch.state, there.failed) == ("applied", [])


def test_outside_of_a_step_ours_runs_alone(there):
    module = there.arm(traced("scale", "wrong"))
    x = torch.rand(4)
    assert torch.equal(module.scale(x), x * 3)
    with there.step(), there.verification.dummy():
        assert torch.equal(module.scale(x), x * 3)
    assert (there.compared, there.patch.state) == (0, "applied")


def test_without_the_variable_there_is_no_comparison_in_it(bench, there):
    bench.arm(traced("scale", "wrong"))
    module = importlib.import_module("ap_m")
    assert torch.equal(module.scale(torch.ones(2)), torch.full((2,), 3.0))
    names = set(module.scale.__code__.co_freevars)
    assert not {"verifier", "oracle"} & names
    # The control: the form that compares has them.
    bench.applier.revert("demo")
    compared = there.arm(traced("scale", "wrong")).scale
    assert {"verifier", "oracle"} <= set(compared.__code__.co_freevars)


@pytest.mark.parametrize("ours", ["wrong", "not_a_number", "raises"])
def test_a_difference_switches_back_and_the_caller_has_the_original_s(there, ours):
    module = there.arm(traced("scale", ours), traced("Layer.forward", "layer"))
    x = torch.rand(4)
    original = x * 2
    held = module.scale
    with there.step():
        assert torch.equal(module.scale(x), original)
        # The other target too: all of a patch, or nothing.
        layer = module.Layer()
        y = x.clone()
        assert layer.forward(y)[0] is y
    assert there.patch.state == "failed"
    assert there.patch.reason.startswith("verification: ap_m:scale, call 1: ")
    assert there.patch.reason.endswith("; the host's own code runs")
    assert {target.state for target in there.patch.targets} == {"reverted"}
    assert len(there.failed) == 1
    # Given back when the step had ended; whoever holds ours has the original.
    assert module.scale is not held
    assert torch.equal(held(x), original)
    assert not there.bench.applier._condemned


def test_targets_are_given_back_after_the_step_and_not_in_it(there):
    """An operator's kernel must not be destroyed while it runs."""
    module = there.arm(traced("scale", "wrong"))
    ours = module.scale
    with there.step():
        module.scale(torch.ones(2))
        assert module.scale is ours
    assert module.scale is not ours


def test_a_result_where_the_original_has_none_is_a_difference(there):
    module = there.arm(traced("scale_", "returns_it"))
    x = torch.rand(4)
    expected = x * 2
    with there.step():
        module.scale_(x)
    assert "is a Tensor instead of None" in there.patch.reason
    assert torch.equal(x, expected)


def test_functions_that_work_in_place_are_compared_in_their_arguments(there):
    def ours(x):
        x.mul_(2)

    sys.modules["ap_ours"].quiet = lambda original: ours
    module = there.arm(traced("scale_", "quiet"))
    x = torch.ones(4)
    with there.step():
        module.scale_(x)
    assert x.tolist() == [2.0] * 4
    assert (there.compared, there.patch.state) == (1, "applied")
    assert there.found["where"].startswith("ap_m:scale_, call 1, tensor argument 0 [4]")


def test_a_wrong_function_in_place_leaves_what_the_original_leaves(there):
    def ours(x):
        x.mul_(3)

    sys.modules["ap_ours"].quiet = lambda original: ours
    module = there.arm(traced("scale_", "quiet"))
    x = torch.rand(3, 4)
    expected = x * 2
    with there.step():
        module.scale_(x[:, 1:3])
    assert torch.equal(x[:, 1:3], expected[:, 1:3])
    assert torch.equal(x[:, ::3], expected[:, ::3] / 2)
    assert there.patch.state == "failed"


def test_a_functional_form_of_a_method_in_place_agrees(there):
    """vLLM's forward_cpu writes to query and returns it; ours leaves it and returns another."""
    module = there.arm(traced("Layer.forward", "layer"))
    x = torch.rand(4)
    with there.step():
        result, key = module.Layer().forward(x, key=None)
    assert torch.equal(result, x * 2)
    assert key is None
    assert (there.compared, there.failed) == (1, [])


def test_a_wrong_functional_form_of_a_method_in_place_gives_the_argument_back(there):
    module = there.arm(traced("Layer.forward", "wrong_layer"))
    x = torch.rand(4)
    expected = x * 2
    with there.step():
        result, _ = module.Layer().forward(x)
    assert result is x
    assert torch.equal(x, expected)


def test_the_number_of_calls_is_kept(there):
    module = there.arm(traced("scale", "right"), calls=2)
    with there.step():
        for _ in range(5):
            module.scale(torch.rand(4))
    assert there.compared == 2
    assert there.bench.state.counters.value("demo/ap_m:scale") == 5


def test_an_original_that_raises_is_not_compared(there, site):
    site.write("ap_m", "def scale(x):\n    raise ValueError('no rope here')\n")
    module = there.arm(traced("scale", "right"))
    with there.step():
        assert torch.equal(module.scale(torch.ones(2)), torch.full((2,), 2.0))
    assert there.patch.state == "applied"
    assert there.found["notes"] == [
        "ap_m:scale was not compared: ValueError: no rope here",
    ]


def test_ours_without_memory_for_it_is_not_wrong(there):
    def ours(x):
        x.mul_(5)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    sys.modules["ap_ours"].greedy = lambda original: ours
    module = there.arm(traced("scale", "greedy"))
    x = torch.ones(2)
    with there.step():
        assert module.scale(x).tolist() == [2.0, 2.0]
    assert x.tolist() == [1.0, 1.0]
    assert there.patch.state == "applied"
    assert "out of memory" in there.found["notes"][0]


def test_tensors_without_data_are_not_compared(there):
    module = there.arm(traced("scale", "right"))
    with there.step():
        module.scale(torch.empty(2, device="meta"))
    assert "without data" in there.found["notes"][0]
    assert there.patch.state == "applied"


def test_nothing_random_is_drawn(there):
    module = there.arm(traced("scale", "right"))
    x = torch.rand(4)
    state = torch.get_rng_state()
    with there.step():
        module.scale(x)
    assert torch.equal(torch.get_rng_state(), state)


# Compiled


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


def test_another_thread_has_ours_while_the_original_runs_in_this_one(there, site):
    site.write(
        "ap_m",
        "between = None\n"
        "def scale(x):\n    if between is not None:\n        between()\n    return x * 2\n",
    )
    module = there.arm(traced("scale", "right"))
    x, seen = torch.ones(2), []

    def between() -> None:
        module.between = None
        other = threading.Thread(target=lambda: seen.append(module.scale(x)))
        other.start()
        other.join()

    module.between = between
    with there.step():
        module.scale(x)
    assert torch.equal(seen[0], x + x * (1 + 2**-23))
    # Both were compared, each with the original in its own thread.
    assert (there.compared, there.patch.state) == (2, "applied")


def test_what_needs_a_patch_that_differs_goes_with_it(there):
    there.bench.declare(traced("scale", "wrong"))
    needs = Target("ap_m:both", "traced", "ap_ours:other")
    sys.modules["ap_ours"].other = lambda original: lambda x: original(x) + 1
    there.bench.declare(needs, name="needy", requires=("demo",))
    module = there.arm()
    x = torch.ones(2)
    assert module.both(x).tolist() == [10.0, 10.0]
    with there.step():
        module.scale(x)
    assert there.bench.state.patches["needy"].state == "failed"
    assert "it needs patch demo, which failed" in there.bench.state.patches["needy"].reason
    assert module.both(x).tolist() == [6.0, 6.0]


# Oracles


def test_an_original_that_is_wrong_has_an_oracle_in_its_place(there):
    module = there.arm(traced("scale", "wrong", oracle="ap_ours:oracle"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.scale(x), x * 3)
    assert (there.compared, there.patch.state) == (1, "applied")


def test_where_ours_is_not_the_oracle_s_the_host_s_own_runs(there):
    module = there.arm(traced("scale", "right", oracle="ap_ours:oracle"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.scale(x), x * 2)
    assert there.patch.state == "failed"


def test_an_oracle_sees_oracles_in_what_it_calls(there):
    """`both` calls `scale`, which the release has wrong: neither makes the other one wrong."""
    sys.modules["ap_ours"].both = lambda original: lambda x: original(x)
    module = there.arm(traced("both", "both"), traced("scale", "wrong", oracle="ap_ours:oracle"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.both(x), x * 3 + (x + 1) * 3)
    assert there.patch.state == "applied", there.patch.reason
    assert there.compared == 3


def test_an_original_has_nothing_of_ours_in_what_it_calls(there):
    """The control: ours in `scale`, seen through `both` alone, is a difference."""
    sys.modules["ap_ours"].both = lambda original: lambda x: original(x)
    module = there.arm(traced("both", "both"), traced("scale", "wrong", oracle="nothing"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.both(x), x * 2 + (x + 1) * 2)
    assert there.patch.reason.startswith("verification: ap_m:both, call 1")


def test_the_reference_stands_in_for_kernels(there):
    from ascend_patch.kernels import dispatch

    wrong_by = [0.0]
    dispatch.register("ap_scale", "cpu", dispatch.Implementation("reference", lambda x: x * 3))
    fast = dispatch.Implementation("fast", lambda x: x * 3 + wrong_by[0], priority=10)
    dispatch.register("ap_scale", "cpu", fast)

    def ours(x):
        found = dispatch.select("ap_scale", "cpu", x).implementation
        assert found is not None
        return found.run(x)

    sys.modules["ap_ours"].kernel = lambda original: ours
    try:
        module = there.arm(traced("scale", "kernel", oracle="reference"))
        x = torch.rand(4)
        with there.step():
            assert torch.equal(module.scale(x), x * 3)
            assert there.patch.state == "applied"
            wrong_by[0] = 1.0
            assert torch.equal(module.scale(x), x * 2)
        assert there.patch.state == "failed"
    finally:
        for name in ("fast", "reference"):
            dispatch.unregister("ap_scale", "cpu", name)


def test_a_host_seam_is_compared_where_it_asks_for_it(there):
    quiet = Target("ap_m:scale", "host", "ap_ours:wrong_host")
    module = there.arm(quiet)
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.scale(x), x * 2 + 1)
    assert (there.compared, there.patch.state) == (0, "applied")


@pytest.mark.parametrize(("ours", "state"), [("host", "applied"), ("wrong_host", "failed")])
def test_a_host_seam_that_asks_for_it(there, ours, state):
    module = there.arm(Target("ap_m:scale", "host", f"ap_ours:{ours}", oracle="original"))
    x = torch.rand(4)
    with there.step():
        assert torch.equal(module.scale(x), x * 2)
    assert there.compared == 1
    assert there.patch.state == state


# STRICT


def test_a_refusal_leaves_nothing_of_ours_in_the_arguments(there):
    def ours(x):
        x.mul_(3)

    sys.modules["ap_ours"].quiet = lambda original: ours
    module = there.arm(traced("scale_", "quiet"))
    there.refuses = True
    x = torch.ones(2)
    with pytest.raises(SystemExit, match="verification"), there.step():
        module.scale_(x)
    assert x.tolist() == [2.0, 2.0]
    assert there.patch.state == "failed"
