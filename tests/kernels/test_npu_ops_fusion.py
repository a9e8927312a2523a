"""npu_fusion_attention on CPU tensors, against attention by its definition in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import npu_ops_attention_oracle as oracle  # noqa: E402
import npu_ops_batches as batches  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels.npu_ops import surface  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings as surface_settings  # noqa: E402

MASK = batches.MASK.bool()
MOST = 2**31 - 1
quick = settings(
    max_examples=100,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def on_the_surface():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    surface.install()
    yield
    torch.set_num_threads(threads)


def call(shape, made, **options):
    if shape.layout == "TND":
        options.setdefault("actual_seq_qlen", list(itertools.accumulate(shape.query_lens)))
        options.setdefault("actual_seq_kvlen", list(itertools.accumulate(shape.kv_lens)))
    options.setdefault("scale", shape.width**-0.5)
    return torch.ops.npu.npu_fusion_attention(
        made.query, made.key, made.value, shape.heads, shape.layout, **options
    )


def judge(shape, made, found, *, mode=0, pre=MOST, after=MOST, masks=None, sinks=None):
    assert found[0].dtype == made.query.dtype
    parts = batches.taken_apart(found[0], shape.query_lens, shape.layout, shape.heads)
    for index, got in enumerate(parts):
        rows, columns = shape.query_lens[index], shape.kv_lens[index]
        mask = None if masks is None else masks[index]
        expected, _ = oracle.attention(
            made.queries[index],
            made.keys[index],
            made.values[index],
            shape.width**-0.5,
            oracle.hidden(rows, columns, mode, pre, after, mask),
            sinks,
        )
        oracle.assert_close(got, expected, shape.dtype, f"sequence {index}")


@st.composite
def shapes(draw, layouts=("TND", "BSH", "SBH", "BSND", "BNSD")):
    layout = draw(st.sampled_from(layouts))
    count = draw(st.integers(1, 4))
    ragged = layout == "TND"
    rows = [draw(st.integers(0 if ragged else 1, 14)) for _ in range(count)]
    columns = [draw(st.integers(1, 20)) for _ in range(count)]
    if not ragged:
        rows, columns = [rows[0]] * count, [columns[0]] * count
    kv_heads, group = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    width = draw(st.sampled_from((1, 32, 40, 128)))
    return batches.Shape(
        tuple(rows),
        tuple(columns),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=width,
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        layout=layout,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@quick
@given(shape=shapes(), mode=st.sampled_from((0, 2, 3, 4)), data=st.data())
def test_any_batch(shape, mode, data):
    pre, after = MOST, MOST
    if mode == 4:
        pre = data.draw(st.integers(0, 20), label="pre_tockens")
        after = data.draw(st.integers(0, 20), label="next_tockens")
    made = batches.make(shape)
    found = call(
        shape,
        made,
        sparse_mode=mode,
        atten_mask=MASK if mode else None,
        pre_tockens=pre,
        next_tockens=after,
    )
    judge(shape, made, found, mode=mode, pre=pre, after=after)


@quick
@given(shape=shapes(layouts=("BSH", "BSND", "BNSD")), form=st.sampled_from((0, 1, 2, 3)))
def test_masks_in_full(shape, form):
    """(Sq, Skv), (1, 1, ..), (B, 1, ..) and (B, N, ..): the last has one a head."""
    made = batches.make(shape)
    batch, rows, columns = len(shape.query_lens), shape.query_lens[0], shape.kv_lens[0]
    rng = np.random.default_rng(shape.seed)
    heads = shape.heads if form == 3 else 1
    each = rng.random((batch if form >= 2 else 1, heads, rows, columns)) < 0.3
    each[..., 0] = False
    mask = torch.from_numpy(each[0, 0] if form == 0 else each)
    found = call(shape, made, sparse_mode=1, atten_mask=mask)
    parts = batches.taken_apart(found[0], shape.query_lens, shape.layout, shape.heads)
    for index, got in enumerate(parts):
        own = each[index if form >= 2 else 0]
        for head in range(shape.heads):
            kv = slice(*[(head * shape.kv_heads // shape.heads) + i for i in (0, 1)])
            expected, _ = oracle.attention(
                made.queries[index][:, head : head + 1],
                made.keys[index][:, kv],
                made.values[index][:, kv],
                shape.width**-0.5,
                own[head if form == 3 else 0],
            )
            oracle.assert_close(got[:, head : head + 1], expected, shape.dtype)


@pytest.mark.parametrize("params", [(0, 128, 128), (1, 65536, 65536), (2, 65536, 0), (3, 65536, 0),
                                    (4, 128, 128), (4, 64, 0)])  # fmt: skip
def test_the_documentations_own_example(params, seed):
    """Its five masks, by triangles, at its shape but for fewer heads; fp16, within its 0.01."""
    mode, pre, after = params
    rng = np.random.default_rng(seed)
    query, key, value = (batches.numbers(rng, 1, 2, 256, 256, dtype="float16") for _ in range(3))
    ones = np.ones((256, 256), bool)
    banded = np.triu(ones, after + 1) | np.tril(ones, -pre - 1)
    hidden = {0: banded, 1: ~ones, 2: np.triu(ones, 1), 3: np.triu(ones, 1), 4: banded}[mode]
    mask = torch.from_numpy(banded)[None, None] if mode == 0 else MASK if mode > 1 else None
    found = torch.ops.npu.npu_fusion_attention(
        query,
        key,
        value,
        2,
        "BNSD",
        scale=0.08838,
        sparse_mode=mode,
        atten_mask=mask,
        pre_tockens=pre,
        next_tockens=after,
    )
    q, k, v = (x[0].double().numpy() for x in (query, key, value))
    scores = q @ k.transpose(0, 2, 1) * 0.08838 - 10000.0 * hidden
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(found[0][0].double().numpy(), expected, atol=0.01, rtol=0.01)


def test_tokens_of_no_sequence():
    """Rows beyond the last end are 0; from CANN 9.0 a trailing 0 must say that they are none."""
    shape = batches.Shape((3, 4), (5, 6), layout="TND", dtype="bfloat16", seed=3)
    made = batches.make(shape)
    exact = call(shape, made)[0]
    more = batches.Made(*(torch.cat((x, x[:2])) for x in (made.query, made.key, made.value)))
    options = {"actual_seq_qlen": [3, 7], "actual_seq_kvlen": [5, 11]}
    zeros = {"actual_seq_qlen": [3, 7, 0, 0], "actual_seq_kvlen": [5, 11, 0, 0]}
    for given_lists in (options, zeros):
        found = call(shape, more, **given_lists)[0]
        assert torch.equal(found[:7], exact)
        assert not found[7:].any()
    with surface_settings(cann="9.0"):
        assert torch.equal(call(shape, more, **zeros)[0][:7], exact)
        assert torch.equal(call(shape, made, **options)[0], exact)
        with pytest.raises(
            RuntimeError, match=r"actual_seq_qlen ends with 7 .* 9 tokens; from CANN"
        ):
            call(shape, more, **options)
        with pytest.raises(RuntimeError, match=r"actual_seq_kvlen ends with 11 .* 13 tokens"):
            call(shape, more, actual_seq_qlen=[3, 7, 0], actual_seq_kvlen=[5, 11, 11])


def test_what_is_kept_for_a_backward_pass():
    """softmax_max and softmax_sum give back the log-sum-exp, eight times over."""
    for layout, kept in (("BNSD", (2, 4, 3, 8)), ("TND", (6, 4, 8))):
        shape = batches.Shape((3, 3), (5, 5), layout=layout, seed=7)
        made = batches.make(shape)
        options = {"softmax_layout": "TND"} if layout == "TND" else {}
        _, largest, total, *rest = call(shape, made, **options)
        assert largest.shape == total.shape == kept
        assert rest[0].numel() == 0
        assert rest[1:] == [0, 0, 0]
        for index in range(2):
            _, lse = oracle.attention(
                made.queries[index], made.keys[index], made.values[index], 128**-0.5,
                np.zeros((3, 5), bool),
            )  # fmt: skip
            found = (largest + total.log()).double().numpy()
            own = found[index].transpose(1, 0, 2) if layout == "BNSD" else found[3 * index :][:3]
            np.testing.assert_allclose(own, np.repeat(lse[..., None], 8, -1), atol=2e-5)


def test_sinks():
    shape = batches.Shape((3, 4), (5, 6), layout="TND", seed=11)
    made = batches.make(shape)
    sinks = np.array([-1.0, 0.5, 3.0, 0.0], np.float32)
    given_sinks = torch.from_numpy(sinks)
    judge(shape, made, call(shape, made, sink=given_sinks), sinks=sinks)
    for release in ("2.7.1.post2", "2.8.0.post2", "2.10.0"):
        with surface_settings(release=release):
            call(shape, made, sink=given_sinks)
    for options, said in (
        ({"release": "2.7.1"}, r"torch_npu 2\.7\.1 has no sink; leave it out"),
        ({"release": "2.8.0"}, r"torch_npu 2\.8\.0 has no sink; leave it out"),
        ({"cann": "8.3"}, r"CANN 8\.3 has no sink, 8\.5 has; leave it out"),
    ):
        with surface_settings(**options), pytest.raises(RuntimeError, match=said):
            call(shape, made, sink=given_sinks)
