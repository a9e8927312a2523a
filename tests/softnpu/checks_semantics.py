"""The semantics of python/softnpu/operators against numpy in float64; runs on the software NPU."""

from __future__ import annotations

import os

import numpy
import torch
import torch_npu
import vllm_ascend.vllm_ascend_C  # noqa: F401
from softnpu.operators import rotary
from softnpu_checks import check, main

NPU = torch.device("npu:0")
random = numpy.random.default_rng(int(os.environ["SEED"]))
C = torch.ops._C_ascend


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, numpy.ndarray]:
    """A random tensor on the npu, and what it holds, in float64."""
    npu = torch.from_numpy(random.standard_normal(shape)).to(dtype)
    return npu.to(NPU), wide(npu)


def wide(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.cpu().double().numpy()


def near(found: torch.Tensor, right: numpy.ndarray, ulps: float = 1.0) -> None:
    """Within so many units in the last place of bfloat16, or for float32 within 1e-5."""
    assert found.device.type == "npu"
    assert found.shape == right.shape, (found.shape, right.shape)
    step = 2.0**-8 * ulps if found.dtype == torch.bfloat16 else 1e-5
    error = numpy.abs(wide(found) - right) - step * numpy.abs(right)
    assert error.max() <= 1e-6 + step * 1e-2, error.max()


def sigmoid(x: numpy.ndarray) -> numpy.ndarray:
    return 1 / (1 + numpy.exp(-x))


def norm(x: numpy.ndarray, gamma: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    return x / numpy.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * gamma


@check
def activations():
    for dtype in (torch.bfloat16, torch.float32):
        x, right = drawn(5, 3, 32, dtype=dtype)
        gate, up = right[..., :16], right[..., 16:]
        near(torch_npu.npu_swiglu(x), gate * sigmoid(gate) * up)
        gate, up = drawn(4, 6, dtype=dtype), drawn(4, 6, dtype=dtype)
        found = torch_npu.npu_swiglu(torch.cat((gate[0], up[0])), 0)
        near(found, gate[1] * sigmoid(gate[1]) * up[1])
        near(torch_npu.npu_silu(x), right * sigmoid(right))
        near(torch_npu.npu_fast_gelu(x), right * sigmoid(1.702 * right), 1.5)


@check
def odd_sizes_and_integers_are_refused():
    for x in (torch.ones(3, 5, device=NPU), torch.ones(2, 4, dtype=torch.int32, device=NPU)):
        message = ""
        try:
            torch_npu.npu_swiglu(x)
        except RuntimeError as error:
            message = str(error)
        assert message.startswith("npu_swiglu: "), message


@check
def product_that_accumulates():
    (x, a), (w, b) = drawn(9, 4), drawn(9, 6)
    total, right = drawn(4, 6, dtype=torch.float32)
    torch_npu._npu_matmul_add_fp32(x, w, total)
    near(total, right + a.T @ b)


@check
def norms_with_a_residual():
    for beta in (False, True):
        (x, a), (y, b) = drawn(7, 64), drawn(7, 64)
        (gamma, g), (shift, s) = drawn(64), drawn(64)
        out, rstd, total = C.npu_add_rms_norm_bias(x, y, gamma, shift if beta else None, 1e-5)
        near(total, a + b)
        kept = wide(total)
        near(rstd, 1 / numpy.sqrt((kept * kept).mean(-1, keepdims=True) + 1e-5))
        near(out, norm(kept, g, 1e-5) + (s if beta else 0), 1.5)
    (x, a), (gamma, g) = drawn(7, 64), drawn(64)
    near(C.npu_gemma_rms_norm(x, gamma, 1e-6)[0], norm(a, 1 + g, 1e-6), 1.5)


@check
def quantization():
    x, right = drawn(11, 48)
    found, scale = torch_npu.npu_dynamic_quant(x)
    near(scale, numpy.abs(right).max(-1) / 127)
    assert found.dtype == torch.int8
    assert numpy.abs(wide(found) - right / wide(scale)[:, None]).max() <= 0.5 + 1e-3
    smooth, s = drawn(48)
    found, scale = torch_npu.npu_dynamic_quant(x, smooth_scales=smooth)
    assert numpy.abs(wide(found) - right * s / wide(scale)[:, None]).max() <= 0.5 + 1e-3
    by = torch.tensor([0.05], device=NPU)
    point = torch.tensor([3.0], device=NPU)
    found = torch_npu.npu_quantize(x, by, point, torch.qint8, -1, True)
    right_ = numpy.clip(right / 0.05 + 3, -128, 127)
    assert numpy.abs(wide(found) - right_).max() <= 0.5 + 1e-3
    found = torch_npu.npu_quantize(x, 1 / by, None, torch.qint8, -1, False)
    assert numpy.abs(wide(found) - numpy.clip(right / 0.05, -128, 127)).max() <= 0.5 + 1e-3


@check
def norms_that_quantize():
    (x, a), (y, b), (gamma, g) = drawn(5, 32), drawn(5, 32), drawn(32)
    by = torch.tensor([0.02], device=NPU)
    first, _, total = torch_npu.npu_add_rms_norm_quant(x, y, gamma, by, None, epsilon=1e-6)
    near(total, a + b)
    right = norm(wide(total), g, 1e-6)
    # The norm is rounded to bfloat16 before it is divided.
    slack = 0.5 + numpy.abs(right / 0.02) * 2.0**-8 + 1e-3
    assert (numpy.abs(wide(first) - numpy.clip(right / 0.02, -128, 127)) <= slack).all()
    first, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(x, y, gamma)
    right = norm(wide(total), g, 1e-6)
    assert numpy.abs(wide(first) * wide(scale)[:, None] - right).max() <= 2 * wide(scale).max()


@check
def top_k_and_top_p():
    x, right = drawn(6, 40, dtype=torch.float32)
    k = torch.tensor([1, 3, 40, 5, 7, 2], dtype=torch.int32)
    p = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.99, 0.01])
    for call in (torch_npu.npu_top_k_top_p, C.npu_apply_top_k_top_p):
        found = wide(call(x, p=p.to(NPU), k=k.to(NPU)))
        for row, out, most, share in zip(right, found, k.tolist(), p.tolist(), strict=True):
            best = numpy.argsort(-row)[:most]
            odds = numpy.exp(row[best] - row[best].max())
            odds /= odds.sum()
            count = 1
            while count < most and odds[:count].sum() < share - 1e-6:
                count += 1
            wanted = numpy.full_like(row, -numpy.inf)
            wanted[best[:count]] = row[best[:count]]
            assert numpy.array_equal(out, wanted), (most, share)


@check
def rotary_of_older_releases():
    """0.18.0 does not define the operator, so its function is called."""
    cache, table = drawn(20, 8, dtype=torch.float32)
    positions = torch.tensor([3, 19, 0])
    for is_neox in (True, False):
        (q, a), (k, b) = drawn(3, 2 * 12), drawn(3, 12)
        found = rotary.rotary_embedding(positions.to(NPU), q, k, 12, cache, is_neox)
        for out, x in zip(found, (a, b), strict=True):
            heads = x.reshape(3, -1, 12).copy()
            turn = table[positions.numpy()][:, None]
            turn = turn[..., :4] + 1j * turn[..., 4:]
            part = heads[..., :8]
            if is_neox:
                product = (part[..., :4] + 1j * part[..., 4:]) * turn
                heads[..., :4], heads[..., 4:8] = product.real, product.imag
            else:
                product = (part[..., ::2] + 1j * part[..., 1::2]) * turn
                heads[..., 0:8:2], heads[..., 1:8:2] = product.real, product.imag
            error = numpy.abs(wide(out).reshape(heads.shape) - heads)
            assert (error <= 2.0**-7 * numpy.abs(heads) + 1e-5).all(), error.max()


@check
def vocabulary_of_a_rank():
    # This rank has original ids 100 to 179, 20 rows of padding, and added ids 1000 to 1009.
    ids = torch.tensor([99, 100, 150, 179, 180, 999, 1000, 1009, 1010])
    rows, masked = C.get_masked_input_and_mask(ids.to(NPU), 100, 180, 20, 1000, 1010)
    assert masked.tolist() == [True, False, False, False, True, True, False, False, True]
    assert rows.tolist() == [0, 0, 50, 79, 0, 0, 100, 109, 0]


@check
def blocks_and_batched_products():
    (x, a), (y, b) = drawn(6, 4, 8), drawn(6, 4, 8)
    C.swap_blocks(x, y, torch.tensor([[0, 5], [3, 1]]))
    b[5], b[1] = a[0], a[3]
    near(y, b)
    (x, a), (w, b), (out, _) = drawn(5, 3, 8), drawn(3, 8, 6), drawn(5, 3, 6)
    C.batch_matmul_transpose(x, w, out)
    near(out, numpy.einsum("mbk,bkn->mbn", a, b))


@check
def experts_by_the_all_gather_path():
    """Gate, sort by expert, multiply, put back: the sum over each token's experts."""
    tokens, hidden, wide_, count, k = 9, 16, 24, 5, 2
    x, right = drawn(tokens, hidden)
    weight, products = drawn(count, hidden, wide_)
    logits, scores = drawn(tokens, count, dtype=torch.float32)
    odds = numpy.exp(scores) / numpy.exp(scores).sum(-1, keepdims=True)
    share, chosen, out = C.moe_gating_top_k(logits, k, 1, 1, 0, 1, 0, False, 1.0, 1e-20)
    near(out, odds)
    best = numpy.argsort(-odds, -1)[:, :k]
    assert (wide(chosen) == best).all()
    kept = numpy.take_along_axis(odds, best, -1)
    near(share, kept / kept.sum(-1, keepdims=True))
    rows, place, counts, _ = C.npu_moe_init_routing_custom(
        x, chosen, active_num=tokens * k, expert_num=count, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, count], quant_mode=-1,
    )  # fmt: skip
    assert wide(counts).tolist() == [float((best == e).sum()) for e in range(count)]
    for types, groups in ((1, counts), (0, counts.cumsum(0))):
        (found,) = torch_npu.npu_grouped_matmul(
            [rows], [weight], group_list=groups, group_list_type=types, group_type=0, split_item=2
        )
        each = numpy.stack([right @ one for one in products])
        summed = torch_npu.npu_moe_token_unpermute(found, place, share)
        wanted = sum(wide(share)[:, [j]] * each[best[:, j], range(tokens)] for j in range(k))
        # Products are rounded to bfloat16 before they are added.
        assert numpy.abs(wide(summed) - wanted).max() < 2.0**-7 * numpy.abs(each).max()


@check
def causal_convolutions_of_a_prefill():
    width, channels, slots = 4, 6, [3, -1, 1, 0]
    starts, carried = [0, 5, 7, 9, 10], [0, 0, 1, 1]
    (x, a), (weight, w), (bias, b) = drawn(12, channels), drawn(width, channels), drawn(channels)
    state, before = drawn(5, width, channels)
    out = C.npu_causal_conv1d_custom(
        x, weight, conv_state=state, bias_opt=bias, query_start_loc_opt=starts,
        cache_indices_opt=slots, initial_state_mode_opt=carried, num_accepted_tokens_opt=[],
        activation_mode=1, pad_slot_id=-1, run_mode=0,
    )  # fmt: skip
    after = before.copy()
    for n, slot in enumerate(slots):
        rows = a[starts[n] : starts[n + 1]]
        if slot < 0:
            assert not wide(out[starts[n] : starts[n + 1]]).any()
            continue
        past = before[slot, : width - 1] * carried[n]
        history = numpy.concatenate([past, rows])
        for t in range(len(rows)):
            total = (history[t : t + width] * w).sum(0) + b
            near(out[starts[n] + t], total * sigmoid(total), 1.5)
        after[slot, : width - 1] = history[-(width - 1) :]
    assert (wide(state) == after).all()


@check
def recurrent_gated_delta_rule():
    lengths, groups, heads, k, v = [2, 1, 3], 2, 4, 8, 6
    tokens = sum(lengths)
    (q, qs), (key, ks), (value, vs) = (
        drawn(tokens, *s) for s in ((groups, k), (groups, k), (heads, v))
    )
    gates, decay = drawn(tokens, heads, dtype=torch.float32)
    gates, decay = -gates.abs(), -numpy.abs(decay)
    beta, bs = drawn(tokens, heads)
    state, held = drawn(9, heads, v, k, dtype=torch.float32)
    slots, accepted = [4, 7, 0, 8, 2, 5], [2, 1, 3]
    for counts in (None, accepted):
        mine, after = state.clone(), held.copy()
        out = torch_npu.npu_recurrent_gated_delta_rule(
            q, key, value, mine, beta=beta, scale=0.25, g=gates,
            actual_seq_lengths=torch.tensor(lengths, dtype=torch.int32, device=NPU),
            ssm_state_indices=torch.tensor(slots, dtype=torch.int32, device=NPU),
            num_accepted_tokens=None if counts is None else torch.tensor(counts, device=NPU),
        )  # fmt: skip
        at = 0
        for n, length in enumerate(lengths):
            begin = at if counts is None else at + counts[n] - 1
            for h in range(heads):
                one, group = held[slots[begin], h].copy(), h // (heads // groups)
                for t in range(at, at + length):
                    one *= numpy.exp(decay[t, h])
                    one += numpy.outer(bs[t, h] * (vs[t, h] - one @ ks[t, group]), ks[t, group])
                    # Large keys make states grow: as near as float32 keeps them.
                    room = 1e-4 * numpy.abs(one).max() * numpy.abs(qs[t, group]).sum()
                    wanted = 0.25 * one @ qs[t, group]
                    error = numpy.abs(wide(out[t, h]) - wanted)
                    assert (error <= 2.0**-8 * numpy.abs(wanted) + room).all()
                    after[slots[t], h] = one
            at += length
        assert numpy.abs(wide(mine) - after).max() <= 1e-4 * numpy.abs(after).max()


@check
def what_experts_and_gdn_do_not_implement_is_refused():
    x, state = drawn(4, 8)[0], drawn(2, 3, 8)[0]
    weight, index = drawn(4, 8)[0], torch.zeros(4, 2, dtype=torch.int32, device=NPU)
    calls = {
        "moe_gating_top_k": lambda: C.moe_gating_top_k(x, 2, 1, 2, 0, 1, 0, False, 1.0, 1e-20),
        "npu_moe_init_routing_custom": lambda: C.npu_moe_init_routing_custom(
            x, index, expert_num=3, expert_tokens_num_type=1, quant_mode=0
        ),
        "npu_grouped_matmul": lambda: torch_npu.npu_grouped_matmul([x, x], [weight, weight]),
        "npu_causal_conv1d_custom": lambda: C.npu_causal_conv1d_custom(
            x, weight, state, None, [0, 4], [0], [0], [1], 1, -1, 1
        ),
    }
    for name, call in calls.items():
        message = ""
        try:
            call()
        except RuntimeError as error:
            message = str(error)
        assert message.startswith(f"{name}: "), (name, message)


if __name__ == "__main__":
    main()
