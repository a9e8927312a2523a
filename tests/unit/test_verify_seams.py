"""Ours beside the original on real seams, and what a difference does."""

from __future__ import annotations

import importlib
import sys
import threading

import pytest

from ascend_patch._registry import Target

torch = pytest.importorskip("torch", reason="torch is not installed")

from verified_site import built, traced  # noqa: E402


@pytest.fixture
def there(site, bench):
    yield from built(site, bench)


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
