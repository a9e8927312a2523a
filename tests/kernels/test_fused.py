"""split_qkv_rmsnorm_rope against an fp64 formula, on each device there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import graphs  # noqa: E402
from fused_judge import expected, run_and_judge  # noqa: E402
from rope_oracle import assert_close  # noqa: E402

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import cases, fused_cases  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
CASE = fused_cases.FusedCase(cases.RopeCase(7, 4, 2, 64, 48))


@pytest.mark.parametrize("case", fused_cases.fused_cases() + fused_cases.upstream_cases(), ids=str)
def test_matches_the_formula(case, seed, device):
    run_and_judge(case, seed, device)


def test_the_formula_rejects_a_missing_offset(seed):
    """The negative control."""
    call, biases = fused_cases.make_fused_inputs(CASE, seed)
    got = rope.split_qkv_rmsnorm_rope(*call, **CASE.options)
    wrong = expected(replace(CASE, weight_offset=1.0), call, biases)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close(got[0], wrong[0])


def test_positions_are_not_raced_for(seed, device):
    """More than 256 tokens with 64 and 4 heads, again and again: the same bits each time."""
    case = fused_cases.fused_cases()[-1]
    call, biases = fused_cases.make_fused_inputs(case, seed, device)
    first = rope.split_qkv_rmsnorm_rope(*call, **biases, **case.options)
    for _ in range(50 if device == "cuda" else 2):
        again = rope.split_qkv_rmsnorm_rope(*call, **biases, **case.options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("tokens", [1, 128, 129, 65536, 70001])
def test_every_variant_agrees_on_cuda(tokens, seed, device):
    if device == "cpu":
        pytest.skip("one variant on CPU: the reference")
    case = replace(CASE, rope=replace(CASE.rope, tokens=tokens))
    call, _ = fused_cases.make_fused_inputs(case, seed, device)
    got = rope.split_qkv_rmsnorm_rope(*call, **case.options)
    few = max(tokens - 5, 0)
    part = (call[0][few:], call[1][few:], *call[2:])
    tail = rope.split_qkv_rmsnorm_rope(*part, **case.options)
    for a, b in zip(got, tail, strict=True):
        torch.testing.assert_close(a[few:], b, rtol=1e-2, atol=1e-2)


def test_compiles_without_a_break(seed):
    call, _ = fused_cases.make_fused_inputs(CASE, seed)

    def model(*call):
        return rope.split_qkv_rmsnorm_rope(*call, **CASE.options)[0] * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*call), model(*call))


@pytest.mark.parametrize("has_gate", [False, True])
def test_one_node_and_no_clone_of_qkv_in_the_functional_graph(has_gate, seed):
    """From the product of a linear layer to the rotated heads."""
    case = replace(CASE, has_gate=has_gate)
    (qkv, positions, cache, *weights), _ = fused_cases.make_fused_inputs(case, seed)

    def attention(hidden, projection, positions, cache, *weights):
        qkv = hidden @ projection
        q, *rest = rope.split_qkv_rmsnorm_rope(qkv, positions, cache, *weights, **case.options)
        return q * 2, *rest

    inputs = (qkv, torch.eye(qkv.shape[1]).bfloat16(), positions, cache, *weights)
    graph, clones = graphs.functionalised(attention, inputs)
    assert graphs.targets(graph).count("ascend_patch.split_qkv_rmsnorm_rope.default") == 1
    assert graphs.copies(graph) == []
    assert clones == 0


def test_the_in_place_form_of_the_same_model_clones(seed):
    """The control: normalise, then rotate slices of qkv in place, as models without us do."""
    (qkv, positions, cache, *_), _ = fused_cases.make_fused_inputs(CASE, seed)

    def attention(hidden, projection, positions, cache):
        q, k, v = (hidden @ projection).split([256, 128, 128], dim=-1)
        rope.rotary_embedding_(positions, q, k, cache, head_size=64, is_neox_style=True)
        return q * 2, k, v

    inputs = (qkv, torch.eye(qkv.shape[1]).bfloat16(), positions, cache)
    _, clones = graphs.functionalised(attention, inputs)
    assert clones >= 1


def test_opcheck(seed):
    call, biases = fused_cases.make_fused_inputs(replace(CASE, has_bias=True), seed)
    options = (4, 2, 64, 1e-6, True, None, False, 0.0, False)
    torch.library.opcheck(
        torch.ops.ascend_patch.split_qkv_rmsnorm_rope.default,
        (*call, biases["q_bias"], biases["k_bias"], *options),
    )


def test_wrong_calls_are_refused():
    call, _ = fused_cases.make_fused_inputs(CASE, 0)
    qkv, positions, cache, weight, _ = call
    with pytest.raises(ValueError, match=r"qkv must be \[T, 512\]"):
        rope.split_qkv_rmsnorm_rope(qkv[:, 1:], *call[1:], **CASE.options)
    with pytest.raises(ValueError, match=r"q_weight must be \[64\]"):
        rope.split_qkv_rmsnorm_rope(qkv, positions, cache, weight[1:], weight, **CASE.options)


def test_the_observer_hears_of_it(monkeypatch):
    heard = []
    monkeypatch.setattr(dispatch, "_observer", heard.append)
    call, _ = fused_cases.make_fused_inputs(CASE, 0)
    rope.split_qkv_rmsnorm_rope(*call, **CASE.options)
    assert heard == ["ascend_patch::split_qkv_rmsnorm_rope"]
