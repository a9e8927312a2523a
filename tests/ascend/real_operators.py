"""Every operator of the surface through the real torch_npu's own Python names, against fp64.

Import it in an environment's process, after torch_npu. Each case yields pairs of what an operator
gave and the fp64 answer.
"""

from __future__ import annotations

import numpy
import torch
import torch_npu
from real_oracle import BLOCK, Paged, dense, fp64, randn, random, ratio, start

from ascend_patch.kernels.npu_ops import surface

operators = surface.install("2.13.0", record=True)


def measured(seed: int) -> dict[str, float]:
    """The largest error of each, by the name of the operators that ran for it."""
    found = {}
    for function in CASES:
        start(seed)
        operators.calls.clear()
        worst = max(ratio(got, wanted) for got, wanted in function())
        ran = {call.operator for call in operators.calls}
        assert ran, function
        found[" + ".join(sorted(ran))] = worst
    return found


def mask():
    return torch.triu(torch.ones(2048, 2048), 1).to(torch.int8)


def fused_infer_paged():
    batch = Paged([130, 0, 300], [5, 70, 1])
    common = {
        "num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "scale": batch.scale,
        "block_table": batch.table, "block_size": BLOCK, "actual_seq_lengths": batch.ends(),
        "actual_seq_lengths_kv": batch.lengths, "atten_mask": mask(),
    }  # fmt: skip
    for more, window in (
        ({"sparse_mode": 3}, None),
        ({"sparse_mode": 4, "pre_tokens": 63, "next_tokens": 0}, 64),
    ):
        found = torch_npu.npu_fused_infer_attention_score(
            batch.query, *batch.flat(), **common, **more
        )
        yield found[0], batch.expected(window=window)


def fused_infer_out():
    batch = Paged([130, 0, 300], [1, 1, 1])
    call = {
        "query": batch.query.flatten(1)[:, None], "key": batch.flat()[0], "value": batch.flat()[1],
        "num_heads": 4, "num_key_value_heads": 2, "input_layout": "BSH", "scale": batch.scale,
        "block_table": batch.table, "block_size": BLOCK, "actual_seq_lengths_kv": batch.lengths,
    }  # fmt: skip
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(**call)
    out, lse = torch.full((3, 1, 512), torch.nan).bfloat16(), torch.empty(1)
    torch_npu.npu_fused_infer_attention_score.out(**call, workspace=workspace, out=[out, lse])
    yield out.view(3, 4, 128), batch.expected()


def fused_infer_v2_with_sinks():
    batch = Paged([130, 0], [5, 70])
    sink = randn(4)
    found = torch_npu.npu_fused_infer_attention_score_v2(
        batch.query, *batch.flat(), num_query_heads=4, num_key_value_heads=2, input_layout="TND",
        softmax_scale=batch.scale, block_table=batch.table, block_size=BLOCK, sparse_mode=3,
        actual_seq_qlen=batch.ends(), actual_seq_kvlen=batch.lengths, atten_mask=mask(),
        learnable_sink=sink,
    )  # fmt: skip
    yield found[0], batch.expected(sink=fp64(sink))


def fusion_attention():
    counts = [3, 40, 1]
    query, key, value = randn(44, 4, 128), randn(44, 2, 128), randn(44, 2, 128)
    ends = numpy.cumsum(counts).tolist()
    for causal in (True, False):
        found = torch_npu.npu_fusion_attention(
            query, key, value, head_num=4, input_layout="TND", scale=0.1, actual_seq_qlen=ends,
            actual_seq_kvlen=ends, sparse_mode=3 if causal else 0,
            atten_mask=mask().bool() if causal else None,
        )  # fmt: skip
        first = 0
        for count, end in zip(counts, ends, strict=True):
            part = slice(first, end)
            visible = numpy.tri(count, dtype=bool) if causal else None
            wanted = dense(
                *(fp64(x)[part] for x in (query, key, value)), scale=0.1, visible=visible
            )
            yield found[0][part], wanted
            first = end


def paged_attention():
    batch = Paged([130, 0, 300], [1, 1, 1], dtype=torch.float16)
    call = {
        "query": batch.query, "key_cache": batch.caches[0], "value_cache": batch.caches[1],
        "num_kv_heads": 2, "num_heads": 4, "scale_value": batch.scale, "block_table": batch.table,
        "context_lens": torch.tensor(batch.lengths, dtype=torch.int32),
        "out": torch.full_like(batch.query, torch.nan),
    }  # fmt: skip
    workspace = torch_npu._npu_paged_attention_get_workspace(**call)
    torch_npu._npu_paged_attention(**call, workspace=workspace)
    yield call["out"], batch.expected()


def flash_attention():
    query, key, value = (randn(150, heads, 64, dtype=torch.float16) for heads in (4, 2, 2))
    out = torch.full_like(query, torch.nan)
    added = torch.triu(torch.full((128, 128), -10000.0), 1).half()
    lengths = torch.tensor([100, 50], dtype=torch.int32)
    torch_npu._npu_flash_attention(query, key, value, added, lengths, 0.125, 4, 2, out)
    for part in (slice(0, 100), slice(100, 150)):
        visible = numpy.tri(part.stop - part.start, dtype=bool)
        wanted = dense(*(fp64(x)[part] for x in (query, key, value)), scale=0.125, visible=visible)
        yield out[part], wanted


def flash_attention_with_a_cache():
    batch = Paged([130, 0], [5, 70])
    out = torch.full_like(batch.query, torch.nan)
    torch_npu._npu_flash_attention_qlens(
        query=batch.query, key_cache=batch.caches[0], value_cache=batch.caches[1],
        block_table=batch.table, mask=torch.triu(torch.ones(128, 128), 1).bfloat16(),
        seq_len=torch.tensor(batch.queries, dtype=torch.int32),
        context_lens=torch.tensor(batch.lengths, dtype=torch.int32), num_kv_heads=2, num_heads=4,
        scale_value=batch.scale, out=out,
    )  # fmt: skip
    yield out, batch.expected()


def writes():
    """Each operator that writes to a cache: the same rows in the same slots."""
    key, value = randn(9, 2, 64), randn(9, 2, 64)
    slots = torch.randperm(5 * 16, generator=random)[:9].int()
    for write in (
        lambda k, v: torch_npu._npu_reshape_and_cache(
            key=key, value=value, key_cache=k, value_cache=v, slot_indices=slots
        ),
        lambda k, v: [
            torch_npu._npu_reshape_and_cache_siso(x, c, slots) for x, c in ((key, k), (value, v))
        ],
        lambda k, v: torch_npu.npu_scatter_pa_kv_cache(key, value, k, v, slots, cache_mode="Norm"),
    ):
        caches = [randn(5, 16, 2, 64) for _ in range(2)]
        expected = [fp64(cache) for cache in caches]
        for wanted, rows in zip(expected, (key, value), strict=True):
            wanted.reshape(80, 2, 64)[slots.numpy()] = fp64(rows)
        write(*caches)
        yield from zip(caches, expected, strict=True)


def reads():
    batch = Paged([130, 0, 40], [1, 1, 1], dtype=torch.float16)
    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    expected = [
        numpy.concatenate(
            [
                numpy.concatenate([fp64(cache[int(block)]) for block in row])[:length]
                for row, length in zip(batch.table, batch.lengths, strict=True)
            ]
        )
        for cache in batch.caches
    ]
    yield from zip(
        torch_npu.atb.npu_paged_cache_load(*batch.caches, batch.table, lengths),
        expected,
        strict=True,
    )
    for read in ("load", "gather"):
        out = [torch.full((sum(batch.lengths), 2, 128), torch.nan).half() for _ in range(2)]
        starts = torch.zeros(3, dtype=torch.int32)
        if read == "load":
            torch_npu.atb.npu_paged_cache_load(
                *batch.caches, batch.table, lengths, seq_starts=starts, key=out[0], value=out[1]
            )
        else:
            torch_npu.npu_gather_pa_kv_cache(
                *batch.caches, batch.table, lengths, *out, seq_offset=starts
            )
        yield from zip(out, expected, strict=True)


def rotate(x: numpy.ndarray, cos: numpy.ndarray, sin: numpy.ndarray) -> numpy.ndarray:
    """NeoX style as a product of complex numbers; cos, sin [T, half], x [T, N, 2 * half]."""
    half = cos.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, None]
    return numpy.concatenate((turned.real, turned.imag), -1)


def rotations():
    """Each rotary operator, on the same heads."""
    angles = torch.rand(30, 64, generator=random) * 6
    cache = torch.cat((angles.cos(), angles.sin()), 1).bfloat16()
    positions = torch.randint(0, 30, (7,), generator=random)
    cos, sin = (part[positions] for part in cache.chunk(2, 1))
    heads = randn(7, 4, 128), randn(7, 2, 128)
    expected = [rotate(fp64(x), fp64(cos), fp64(sin)) for x in heads]
    full = [torch.cat((a, a), -1)[None, :, None] for a in (cos, sin)]
    flat = [x.flatten(1) for x in heads]
    for x, wanted in zip(heads, expected, strict=True):
        yield torch_npu.npu_rotary_mul(x[None], *full)[0], wanted
    turned = torch_npu.npu_mrope(positions, *flat, cache, 128)
    yield from ((x.view(7, -1, 128), wanted) for x, wanted in zip(turned, expected, strict=True))
    changed = [x.clone()[None] for x in heads]
    torch_npu.npu_apply_rotary_pos_emb(*changed, *full)
    yield from ((x[0], wanted) for x, wanted in zip(changed, expected, strict=True))
    changed = [x.clone() for x in flat]
    torch_npu._npu_rotary_embedding(positions, *changed, 128, cache, True)
    yield from ((x.view(7, -1, 128), wanted) for x, wanted in zip(changed, expected, strict=True))


def norms():
    x, other, gamma = randn(6, 256), randn(6, 256), randn(256)

    def normed(wide, weight):
        inverse = 1 / numpy.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
        return wide * inverse * weight, inverse

    yield from zip(
        torch_npu.npu_rms_norm(x, gamma, 1e-5), normed(fp64(x), fp64(gamma)), strict=True
    )
    yield from zip(
        torch_npu.npu_gemma_rms_norm(x, gamma, 1e-5), normed(fp64(x), 1 + fp64(gamma)), strict=True
    )
    y, inverse, total = torch_npu.npu_add_rms_norm(x, other, gamma, 1e-5)
    yield total, fp64(x) + fp64(other)
    yield from zip((y, inverse), normed(fp64(total), fp64(gamma)), strict=True)


CASES = (
    fused_infer_paged, fused_infer_out, fused_infer_v2_with_sinks, fusion_attention,
    paged_attention, flash_attention, flash_attention_with_a_cache, writes, reads, rotations, norms,
)  # fmt: skip
