"""What ours is held to where the original is wrong, or must not run twice."""

from __future__ import annotations

import sys

import pytest

from ascend_patch._registry import Target

torch = pytest.importorskip("torch", reason="torch is not installed")

from verified_site import built, traced  # noqa: E402


@pytest.fixture
def there(site, bench):
    yield from built(site, bench)


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
