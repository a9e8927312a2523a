"""What only a GPU shows of split_qkv_rmsnorm_rope and apply_rotary: races, graphs, warm-up."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

import fused_judge  # noqa: E402
from rope_oracle import assert_close  # noqa: E402

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import (  # noqa: E402
    angles_call,
    angles_cases,
    cases,
    fused_call,
    fused_cases,
)

FUSED = fused_cases.FusedCase(cases.RopeCase(7, 12, 2, 128, 96), has_gate=True, weight_offset=1.0)
ANGLES = angles_cases.AnglesCase(17, 12, 80, 80, batch=2, per_entry=True)


@pytest.mark.parametrize(
    ("heads", "tokens"),
    [((64, 4), 257), ((64, 4), 300), ((64, 4), 4096), ((12, 1), 1025), ((12, 1), 10240)],
)
@pytest.mark.parametrize("section", [None, (24, 20, 20)])
def test_positions_that_change_right_before_and_after_are_not_raced_for(
    heads, tokens, section, seed
):
    """Where vllm-ascend's kernel read them racily, and beyond.

    Another kernel writes the positions before each call and zeroes them after. The results are bit
    by bit what a call alone gives, which the formula judges: a program that reads a position before
    it is there, or again once it is gone, differs.
    """
    shape = cases.RopeCase(tokens, *heads, 128, 128, max_position=8192, mrope_section=section)
    case = fused_cases.FusedCase(shape)
    call, _ = fused_cases.make_fused_inputs(case, seed, "cuda")
    qkv, held, *rest = call
    generator = torch.Generator("cuda").manual_seed(seed)
    sets = torch.randint(0, 8192, (8, *held.shape), device="cuda", generator=generator)
    alone = []
    for positions in sets:
        torch.cuda.synchronize()
        alone.append(rope.split_qkv_rmsnorm_rope(qkv, positions, *rest, **case.options))
    if tokens < 1000:
        want = fused_judge.expected(case, (qkv, sets[0], *rest), {})
        for got, judge in zip(alone[0], want, strict=True):
            assert_close(got, judge)
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    for n in range(1500 if tokens < 1000 else 150):
        chosen = n * 5 % 8
        torch.add(sets[chosen], 0, out=held)
        got = rope.split_qkv_rmsnorm_rope(qkv, held, *rest, **case.options)
        held.zero_()
        for a, b in zip(got, alone[chosen], strict=True):
            differing += (a != b).sum()
    assert int(differing) == 0


def test_the_race_test_can_fail(seed):
    """The control: positions of another set, as a program that reads late would see them."""
    case = fused_cases.FusedCase(cases.RopeCase(257, 64, 4, 128, 128, max_position=8192))
    call, _ = fused_cases.make_fused_inputs(case, seed, "cuda")
    qkv, held, *rest = call
    right = rope.split_qkv_rmsnorm_rope(qkv, held, *rest, **case.options)
    late = held.clone()
    late[200:] = 0
    got = rope.split_qkv_rmsnorm_rope(qkv, late, *rest, **case.options)
    assert not torch.equal(got[0], right[0])


def calls_of(operator, tokens, seed):
    """(call, warm): what runs, and what compiles it beforehand."""
    if operator == "fused":
        case = replace(FUSED, rope=replace(FUSED.rope, tokens=tokens))
        call, biases = fused_cases.make_fused_inputs(case, seed, "cuda")
        options = {**biases, **case.options}
        return (
            lambda: rope.split_qkv_rmsnorm_rope(*call, **options),
            lambda: fused_call.warm(*call, **options),
        )
    case = replace(ANGLES, places=tokens)
    call = angles_cases.make_angles_inputs(case, seed, "cuda")
    return (
        lambda: (rope.apply_rotary(*call, is_neox_style=True),),
        lambda: angles_call.warm(*call, is_neox_style=True),
    )


def compiled_kernels():
    from ascend_patch.kernels.rope.angles_kernel import angles_kernel
    from ascend_patch.kernels.rope.fused_kernel import fused_kernel

    kernels = (angles_kernel, fused_kernel)
    return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())


@pytest.mark.parametrize("operator", ["fused", "angles"])
@pytest.mark.parametrize("tokens", [1, 16, 257, 70001])
def test_warmed_calls_are_captured_without_compiling(operator, tokens, seed):
    _, warm = calls_of(operator, 3, seed)
    assert warm()
    before = compiled_kernels()
    run, _ = calls_of(operator, tokens, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    assert compiled_kernels() == before, "the kernel was compiled inside a capture"
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


@pytest.mark.parametrize("operator", ["split_qkv_rmsnorm_rope", "apply_rotary"])
def test_triton_serves_cuda(operator):
    assert dispatch.candidates(operator, "cuda")[0].name == "triton"


def test_a_transposed_x_goes_to_the_reference(seed):
    x, cos, sin = angles_cases.make_angles_inputs(ANGLES, seed, "cuda")
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    got = rope.apply_rotary(turned, cos, sin, is_neox_style=True)
    want = rope.apply_rotary(x, cos, sin, is_neox_style=True)
    torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)
