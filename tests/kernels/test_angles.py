"""apply_rotary against the fp64 oracle, on each device there is, and under torch.compile."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from angles_judge import judge, run_and_judge  # noqa: E402

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import angles_call, angles_cases  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
CASE = angles_cases.AnglesCase(17, 4, 80, 32, batch=2, per_entry=True)


@pytest.mark.parametrize("case", angles_cases.angles_cases(), ids=str)
def test_matches_the_oracle(case, seed, device):
    run_and_judge(case, seed, device)


def test_every_axis_value_is_covered():
    cases = [c for c in angles_cases.angles_cases() if c.places > 1]
    assert {(c.batch, c.per_entry) for c in cases} == set(angles_cases.LAYOUTS)
    assert {c.heads for c in cases} >= {1, 12, 16, 64}
    assert {(c.from_qkv, c.is_neox_style) for c in cases} == {
        (q, s) for q in (True, False) for s in (True, False)
    }


def test_the_oracle_rejects_a_negated_sine(seed):
    """The negative control."""
    x, cos, sin = angles_cases.make_angles_inputs(CASE, seed)
    got = rope.apply_rotary(x, cos, -sin, is_neox_style=True)
    with pytest.raises(AssertionError, match="out of bounds"):
        judge(CASE, got, (x, cos, sin))


def test_the_oracle_rejects_the_first_entrys_angles_for_all(seed):
    """What a kernel that forgets the batch stride would do."""
    x, cos, sin = angles_cases.make_angles_inputs(CASE, seed)
    got = rope.apply_rotary(x, cos[0], sin[0], is_neox_style=True)
    with pytest.raises(AssertionError, match="out of bounds"):
        judge(CASE, got, (x, cos, sin))


def test_opcheck(seed):
    call = angles_cases.make_angles_inputs(CASE, seed)
    torch.library.opcheck(torch.ops.ascend_patch.apply_rotary.default, (*call, True))


def test_one_node_in_a_compiled_graph(seed):
    call = angles_cases.make_angles_inputs(CASE, seed)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    def tower(x, cos, sin):
        return rope.apply_rotary(x * 2, cos, sin, is_neox_style=True) + 1

    compiled = torch.compile(tower, fullgraph=True, backend=keep)
    assert torch.equal(compiled(*call), tower(*call))
    targets = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert targets.count("ascend_patch.apply_rotary.default") == 1
    assert len(targets) == 3, targets


def test_the_kernel_turns_down_what_would_compile_anew():
    x, cos, sin = angles_cases.make_angles_inputs(CASE, 0)
    call = (torch.empty_like(x), x, cos, sin, True)
    assert angles_call.supports(*call) == (True, "")
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    ok, reason = angles_call.supports(call[0], transposed, *call[2:])
    assert not ok
    assert "transposed" in reason
    ok, reason = angles_call.supports(call[0], x, cos.t() if cos.dim() == 2 else cos.mT, sin, True)
    assert not ok
    assert "row of cos" in reason


def test_the_observer_hears_of_it(monkeypatch, seed):
    heard = []
    monkeypatch.setattr(dispatch, "_observer", heard.append)
    rope.apply_rotary(*angles_cases.make_angles_inputs(CASE, seed), is_neox_style=True)
    assert heard == ["ascend_patch::apply_rotary"]
