"""The surface against what op-plugin's own operator tests expect of an NPU: attention.

Each test names the one of op-plugin's `test/test_custom_ops` whose shapes and inputs it has, some
of them smaller; the expected results are computed here, densely and in fp64. Left out are those for
Ascend 950, for quantised tensors and for NZ caches.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.npu_ops import fused_infer, fusion, paged  # noqa: E402

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def generator(seed):
    torch.set_num_threads(1)
    return torch.Generator().manual_seed(seed)


def fp64(x) -> np.ndarray:
    return x.double().numpy()


def uniform(generator, *shape, dtype=HALF):
    return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)


def dense(query, key, value, scale, added=None, sink=None):
    """[S, N, D], [K, KV_N, D], [K, KV_N, Dv] -> (out [S, N, Dv], max and sum of weights [S, N]).

    ``added``: [S, K], to the scaled scores; ``sink``: [N], a logit more.
    """
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    out = np.zeros((query.shape[0], heads, value.shape[2]))
    maxima, sums = np.zeros(out.shape[:2]), np.zeros(out.shape[:2])
    for head in range(heads):
        scores = scale * query[:, head] @ key[:, head // group].T
        scores = scores if added is None else scores + added
        logits = scores
        if sink is not None:
            logits = np.concatenate((scores, np.full((len(scores), 1), sink[head])), 1)
        maxima[:, head] = logits.max(1)
        sums[:, head] = np.exp(logits - maxima[:, head, None]).sum(1)
        weights = np.exp(scores - maxima[:, head, None]) / sums[:, head, None]
        out[:, head] = weights @ value[:, head // group]
    return out, maxima, sums


def assert_near(got, wanted: np.ndarray, precision: float = 1e-3) -> None:
    """Within torch_npu's relative precision, of each element or of all; in bfloat16 a rounding."""
    assert got.shape == wanted.shape
    precision = max(precision, 2.0**-8 if got.dtype == BF16 else 0)
    error = np.abs(fp64(got) - wanted)
    least = np.sqrt(np.mean(wanted**2))
    assert (error <= precision * np.maximum(np.abs(wanted), least)).all(), error.max()


def gathered(cache, table, length) -> np.ndarray:
    """The first tokens of a request out of [blocks, block_size, KV_N, D]."""
    block_size = cache.shape[1]
    rows = [fp64(cache[int(table[j // block_size]), j % block_size]) for j in range(length)]
    return np.stack(rows)


def heads_first(x) -> list[np.ndarray]:
    """[B, N, S, D] -> for each of B, [S, N, D]."""
    return list(fp64(x).transpose(0, 2, 1, 3))


WIDE = {"pre_tokens": 65535, "next_tokens": 65535}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (1, 512)])
@pytest.mark.parametrize("scale", [1 / 0.0078125, 128**-0.5])
def test_fused_infer_attention_score_bnsd(generator, version, rows, columns, scale):
    """pfa_return_lse and ifa_return_lse, of both versions: (1, 32, 2048 or 1, 128) there."""
    query = torch.randn(1, 32, rows, 128, generator=generator).half()
    key, value = (torch.randn(1, 32, columns, 128, generator=generator).half() for _ in range(2))
    if version == 1:
        found = fused_infer.npu_fused_infer_attention_score(
            query, key, value, num_heads=32, input_layout="BNSD", scale=scale,
            softmax_lse_flag=True, **WIDE,
        )  # fmt: skip
    else:
        found = fused_infer.npu_fused_infer_attention_score_v2(
            query, key, value, num_query_heads=32, input_layout="BNSD", softmax_scale=scale,
            return_softmax_lse=True, **WIDE,
        )  # fmt: skip
    wanted, maxima, sums = dense(*(heads_first(x)[0] for x in (query, key, value)), scale)
    # At a scale of 128 scores are in the thousands, and float32 has 3 digits behind their point.
    assert_near(found[0][0].transpose(0, 1), wanted, 1e-3 if scale < 1 else 5e-2)
    assert found[1].dtype == torch.float32
    assert_near(found[1], (np.log(sums) + maxima).T[None, :, :, None], 1e-4)


def test_fused_infer_attention_score_out_with_workspace(generator):
    """with_workspace: ifa_return_lse, into outputs that hold something."""
    query = torch.randn(1, 32, 1, 128, generator=generator).half()
    key, value = (torch.randn(1, 32, 256, 128, generator=generator).half() for _ in range(2))
    call = {"num_heads": 32, "input_layout": "BNSD", "scale": 128**-0.5, **WIDE}
    workspace = fused_infer.v1_workspace(query, key, value, **call)
    for flag in (False, True):
        out = [torch.full_like(query, torch.nan)]
        out.append(torch.full((1, 32, 1, 1) if flag else (1,), torch.nan))
        returned = fused_infer.v1_out(
            query, key, value, **call, softmax_lse_flag=flag, workspace=workspace, out=out
        )
        wanted, maxima, sums = dense(*(heads_first(x)[0] for x in (query, key, value)), 128**-0.5)
        assert [a is b for a, b in zip(returned, out, strict=True)] == [True, True]
        assert_near(out[0][0].transpose(0, 1), wanted)
        if flag:
            assert_near(out[1], (np.log(sums) + maxima).T[None, :, :, None], 1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("constant", [True, False])
def test_fused_infer_attention_score_ntd_tnd(generator, version, constant):
    """ntd_tnd: (2, 32, 192) with values 128 wide, all ones there."""
    query, key, value = (
        torch.ones(2, 32, size, dtype=BF16)
        if constant
        else torch.randn(2, 32, size, generator=generator).bfloat16()
        for size in (192, 192, 128)
    )
    scale = 1 / 0.0078125 if constant else 192**-0.5
    if version == 1:
        found = fused_infer.npu_fused_infer_attention_score(
            query, key, value, num_heads=2, input_layout="NTD_TND", scale=scale,
            actual_seq_lengths=[32], actual_seq_lengths_kv=[32], **WIDE,
        )  # fmt: skip
    else:
        found = fused_infer.npu_fused_infer_attention_score_v2(
            query, key, value, num_query_heads=2, input_layout="NTD_TND", softmax_scale=scale,
            actual_seq_qlen=[32], actual_seq_kvlen=[32], **WIDE,
        )  # fmt: skip
    wanted, *_ = dense(*(fp64(x).transpose(1, 0, 2) for x in (query, key, value)), scale)
    assert_near(found[0], wanted)


@pytest.mark.parametrize("batch", [1, 5])
def test_npu_infer_attention_pa(generator, batch):
    """infer_attention_score_PA: TND over a paged cache, keys 192 wide and values 128, one kv head.

    Its block table is random where its cache has one block; here the blocks are those that exist.
    """
    heads, block_size = 16, 128
    lengths = torch.randint(1, 300, (batch,), generator=generator).tolist()
    lengths[0] = 69
    columns, blocks = 32, 3 * batch
    table = torch.randperm(blocks, generator=generator).view(batch, 3).int()
    wide = torch.full((batch, columns), blocks + 7, dtype=torch.int32)
    wide[:, :3] = table
    query = torch.rand(batch, heads, 192, generator=generator).half()
    caches = [
        torch.rand(blocks, block_size, size, generator=generator).half() for size in (192, 128)
    ]
    found, _ = fused_infer.npu_fused_infer_attention_score(
        query, *caches, num_heads=heads, num_key_value_heads=1, input_layout="TND",
        scale=192**-0.5, block_table=wide, block_size=block_size,
        actual_seq_lengths=list(range(1, batch + 1)), actual_seq_lengths_kv=lengths,
    )  # fmt: skip
    for request, length in enumerate(lengths):
        keys, values = (gathered(c.unsqueeze(2), table[request], length) for c in caches)
        wanted, *_ = dense(fp64(query[request])[None], keys, values, 192**-0.5)
        assert_near(found[request][None], wanted)


@pytest.mark.parametrize("constant", [True, False])
def test_fused_infer_attention_score_v2_sink(generator, constant):
    """sink: TND, (128, 8, 128), all ones there, a learnable sink for each head."""
    query, key, value = (
        torch.ones(128, 8, 128, dtype=BF16)
        if constant
        else torch.randn(128, 8, 128, generator=generator).bfloat16()
        for _ in range(3)
    )
    sink = torch.ones(8) if constant else torch.randn(8, generator=generator) * 4
    scale = 1 / 0.0078125 if constant else 128**-0.5
    found, lse = fused_infer.npu_fused_infer_attention_score_v2(
        query, key, value, learnable_sink=sink.bfloat16(), num_query_heads=8, input_layout="TND",
        softmax_scale=scale, actual_seq_qlen=[128], actual_seq_kvlen=[128],
        return_softmax_lse=True, **WIDE,
    )  # fmt: skip
    wanted, *_ = dense(fp64(query), fp64(key), fp64(value), scale, sink=fp64(sink.bfloat16()))
    assert_near(found, wanted)
    assert lse.shape == (128, 8, 1)


@pytest.mark.parametrize("layout", ["BSH", "BNSD", "BSND", "SBH"])
def test_npu_flash_attention(generator, layout):
    """npu_flash_attention: (1, 32, 128, 128) as BSH, no mask; here two, and the other layouts."""
    query, key, value = (torch.randn(2, 32, 128, 128, generator=generator).half() for _ in range(3))

    def laid_out(x):
        rows = x.transpose(1, 2)
        return {
            "BNSD": x,
            "BSND": rows,
            "BSH": rows.flatten(2),
            "SBH": rows.flatten(2).transpose(0, 1),
        }[layout].contiguous()

    out, maxima, sums, empty, *numbers = fusion.npu_fusion_attention(
        *(laid_out(x) for x in (query, key, value)), head_num=32, input_layout=layout, scale=0.08838
    )
    for index in range(2):
        wanted, top, total = dense(*(heads_first(x)[index] for x in (query, key, value)), 0.08838)
        entry = out[:, index] if layout == "SBH" else out[index]
        entry = entry.transpose(0, 1) if layout == "BNSD" else entry
        assert_near(entry.reshape(128, 32, 128), wanted)
        assert_near(maxima[index], np.repeat(top.T[..., None], 8, -1), 1e-4)
        assert_near(sums[index], np.repeat(total.T[..., None], 8, -1), 1e-4)
    assert empty.numel() == 0
    assert numbers == [0, 0, 0]


def test_npu_flash_attention_tnd(generator):
    """flash_attention_tnd: queries 1, 2, 3, keys 3, 4, 5, 8 heads over 2, statistics as TND."""
    rows, columns, heads, kv_heads, size = [1, 2, 3], [3, 4, 5], 8, 2, 128
    query = uniform(generator, sum(rows), heads, size)
    key, value = (uniform(generator, sum(columns), kv_heads, size) for _ in range(2))
    ends, kv_ends = np.cumsum(rows).tolist(), np.cumsum(columns).tolist()
    out, maxima, sums, *_ = fusion.npu_fusion_attention(
        query, key, value, heads, scale=size**-0.5, input_layout="TND", actual_seq_qlen=ends,
        actual_seq_kvlen=kv_ends, softmax_layout="TND",
    )  # fmt: skip
    first, kv_first = 0, 0
    for end, kv_end in zip(ends, kv_ends, strict=True):
        own, seen = slice(first, end), slice(kv_first, kv_end)
        wanted, top, total = dense(fp64(query)[own], fp64(key)[seen], fp64(value)[seen], size**-0.5)
        assert_near(out[own], wanted)
        assert_near(maxima[own], np.repeat(top[..., None], 8, -1), 1e-4)
        assert_near(sums[own], np.repeat(total[..., None], 8, -1), 1e-4)
        first, kv_first = end, kv_end


def test_atb_paged_attention(generator):
    """paged_attention: 32 heads over 16, keys 288 wide and values 96, contexts of 1024."""
    tokens, heads, kv_heads, sizes, blocks, block_size = 2, 32, 16, (288, 96), 16, 128
    query = uniform(generator, tokens, heads, sizes[0])
    caches = [uniform(generator, blocks, block_size, kv_heads, size) for size in sizes]
    lengths = torch.tensor([1024, 256], dtype=torch.int32)
    table = torch.randint(0, blocks, (tokens, 8), generator=generator).int()
    out = torch.full((tokens, heads, sizes[1]), torch.nan).half()
    call = (query, *caches, kv_heads, heads, sizes[0] ** -0.5, table, lengths, out)
    workspace = paged._npu_paged_attention_get_workspace(*call)
    paged._npu_paged_attention(*call, workspace=workspace)
    for token, length in enumerate(lengths.tolist()):
        keys, values = (gathered(c, table[token], length) for c in caches)
        wanted, *_ = dense(fp64(query[token])[None], keys, values, sizes[0] ** -0.5)
        assert_near(out[token][None], wanted)


@pytest.mark.parametrize("kv_heads", [32, 8])
@pytest.mark.parametrize("masked", [True, False])
def test_atb_flash_attention(generator, kv_heads, masked):
    """flash_attention: 16 sequences of 128 there, a float16 mask of -10000 above the diagonal.

    flash_attention_unpad: the same without a mask.
    """
    batch, tokens, heads, size = 3, 128, 32, 128
    narrow = int(torch.randint(1, size, (), generator=generator))
    query = uniform(generator, batch * tokens, heads, size)
    key = uniform(generator, batch * tokens, kv_heads, size)
    value = uniform(generator, batch * tokens, kv_heads, narrow)
    mask = torch.triu(torch.full((tokens, tokens), -10000.0), 1).half()
    out = torch.full((batch * tokens, heads, narrow), torch.nan).half()
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    scale = float(np.float16(size**-0.5))
    rest = (lengths, scale, heads, kv_heads, out)
    if masked:
        paged._npu_flash_attention(query, key, value, mask, *rest)
    else:
        paged._npu_flash_attention_unpad(query, key, value, *rest)
    for index in range(batch):
        part = slice(index * tokens, (index + 1) * tokens)
        wanted, *_ = dense(
            *(fp64(x)[part] for x in (query, key, value)),
            scale,
            added=fp64(mask) if masked else None,
        )
        assert_near(out[part], wanted)


def test_atb_flash_attention_qlens(generator):
    """flash_attention_qlens: two requests, a part of each cached; a bfloat16 mask of ones."""
    heads, kv_heads, size, blocks, block_size, whole = 32, 16, 128, 16, 128, 512
    cached = (torch.randint(1, 4, (2,), generator=generator) * 128).tolist()
    rows = [whole - context for context in cached]
    query = uniform(generator, sum(rows), heads, size, dtype=BF16)
    caches = [uniform(generator, blocks, block_size, kv_heads, size, dtype=BF16) for _ in range(2)]
    table = torch.randint(0, blocks, (2, whole // block_size), generator=generator).int()
    mask = torch.triu(torch.ones(128, 128), 1).bfloat16()
    out = torch.full((sum(rows), heads, size), torch.nan).bfloat16()
    paged._npu_flash_attention_qlens(
        query=query, key_cache=caches[0], value_cache=caches[1], block_table=table, mask=mask,
        seq_len=torch.tensor(rows, dtype=torch.int32),
        context_lens=torch.full((2,), whole, dtype=torch.int32), num_kv_heads=kv_heads,
        num_heads=heads, scale_value=size**-0.5, out=out,
    )  # fmt: skip
    first = 0
    for request, count in enumerate(rows):
        keys, values = (gathered(c, table[request], whole) for c in caches)
        future = np.triu(np.full((whole, whole), -10000.0), 1)[whole - count :]
        part = slice(first, first + count)
        wanted, *_ = dense(fp64(query)[part], keys, values, size**-0.5, added=future)
        assert_near(out[part], wanted)
        first += count
