"""attend's edges: what it refuses, where it writes, what the operators are given."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import attention_batches as batches  # noqa: E402

from ascend_patch.kernels.attention.attend import Batch, attend, causal_mask  # noqa: E402
from ascend_patch.kernels.attention.batch import cuts  # noqa: E402
from ascend_patch.kernels.attention.case import Case  # noqa: E402
from ascend_patch.kernels.attention.route import route  # noqa: E402
from ascend_patch.kernels.npu_ops import surface  # noqa: E402


@pytest.fixture
def calls():
    """What the operators are called with, as the surface notes it."""
    found = surface.install(record=True)
    found.calls.clear()
    with surface.settings(allow=("float32",)):
        yield found.calls
    found.record = False
    found.calls.clear()


def made(**fields):
    given = {"state": "chunked", "queries": (3, 1, 4), "contexts": (20, 33, 0), "seed": 7}
    return batches.make(batches.Asked(**{**given, **fields}))


def test_the_mask_is_causal():
    mask = causal_mask("cpu")
    assert mask.dtype == torch.int8
    assert torch.equal(mask, torch.triu(torch.ones(2048, 2048), 1).to(torch.int8))
    assert causal_mask(torch.device("cpu")) is mask


def test_a_device_s_mask_is_kept_for_a_step_and_no_longer(calls):
    """What is made while a model loads is unmapped with its weights when vLLM sleeps."""
    first, second = causal_mask("meta"), causal_mask("meta")
    assert first is not second
    assert list(first.shape) == [2048, 2048]
    it = made()
    batch, found = it.batch, route(it.asked.case)
    for _ in range(2):
        it.answer(found, batch)
    one, other = (call.kwargs["atten_mask"] for call in calls)
    assert one is other is batch.derived["mask"]


def test_a_chunk_s_arguments(calls):
    it = made(window=8, group=4)
    it.answer(route(it.asked.case))
    (call,) = calls
    assert call.operator == "npu::npu_fused_infer_attention_score"
    said = {name: call.kwargs[name] for name in (
        "input_layout", "sparse_mode", "pre_tokens", "next_tokens", "num_heads",
        "num_key_value_heads", "block_size", "actual_seq_lengths", "actual_seq_lengths_kv",
    )}  # fmt: skip
    assert said == {
        "input_layout": "TND",
        "sparse_mode": 4,
        "pre_tokens": 7,
        "next_tokens": 0,
        "num_heads": 4,
        "num_key_value_heads": 1,
        "block_size": 16,
        "actual_seq_lengths": [3, 4, 8],
        "actual_seq_lengths_kv": [23, 34, 4],
    }
    assert call.kwargs["scale"] == pytest.approx(128**-0.5)
    assert call.kwargs["key"].data_ptr() == it.key_cache.data_ptr(), "the cache was copied"
    assert call.kwargs["query"].data_ptr() == it.query.data_ptr(), "the query was copied"


def test_requests_with_one_query_share_a_call(calls):
    it = made(queries=(1, 5, 1, 1, 2), contexts=(9,) * 5, head_size=256, window=4)
    it.answer(route(it.asked.case))
    assert [list(c.kwargs["query"].shape[:2]) for c in calls] == [[1, 5], [1, 2], [3, 1]]
    assert {c.kwargs["input_layout"] for c in calls} == {"BSH"}


def test_layers_of_a_step_sort_the_batch_once(calls):
    it = made(head_size=256, window=4, layout="blocks first", block_size=24)
    batch, found = it.batch, route(it.asked.case)
    it.answer(found, batch)
    kept = {name: id(value) for name, value in batch.derived.items()}
    assert not it.judge(it.answer(found, batch))
    assert {name: id(value) for name, value in batch.derived.items()} == kept


def test_another_layer_s_cache_is_read_for_itself(calls):
    """What a step keeps is where keys are, never the keys."""
    for fields in (
        {"layout": "blocks first"},
        {"head_size": 256, "window": 4, "queries": (1,) * 3},
    ):
        one, other = made(**fields), made(**fields, seed=8)
        other.asked, batch = replace(other.asked, seed=8), one.batch
        # The same places in another layer's cache.
        for mine, theirs in (
            (one.key_cache, other.key_cache),
            (one.value_cache, other.value_cache),
        ):
            theirs.copy_(torch.where(mine.isnan(), mine, torch.randn(mine.shape)))
        size = one.asked.block_size
        for request, length in enumerate(one.asked.lens):
            row = one.table[request].long()
            where = torch.arange(length)
            place = row[where // size], where % size
            other.keys[request], other.values[request] = (
                cache[place] for cache in (other.key_cache, other.value_cache)
            )
        other.table, other.query = one.table, one.query
        found = route(one.asked.case)
        assert not one.judge(one.answer(found, batch))
        assert not other.judge(other.answer(found, batch))


def test_two_dimensional_tensors(calls):
    it = made()
    flat = torch.full_like(it.query, float("nan")).flatten(1)
    attend(
        route(it.asked.case),
        it.batch,
        it.query.flatten(1),
        it.key.flatten(1),
        it.value.flatten(1),
        it.key_cache,
        it.value_cache,
        flat,
        num_heads=1,
        num_kv_heads=1,
        head_size=128,
        scale=128**-0.5,
    )
    assert not it.judge(flat.view(it.query.shape))


def test_requests_that_hold_nothing(calls):
    """Cross attention before the encoder has run: zeros, and no operator is asked."""
    it = made(attn_type="encoder_decoder", contexts=(0, 0, 0), causal=False)
    assert not it.judge(it.answer(route(it.asked.case)))
    assert not calls


def test_an_empty_batch_calls_nothing(calls):
    it = made(queries=(0, 0), contexts=(5, 0), spare=2)
    out = it.answer(route(it.asked.case))
    assert (out[:2] == 0).all()
    # Not even where the route was made for another batch.
    assert not it.judge(it.answer(route(Case("chunked", head_size=128, soc="emulated"))))
    assert not calls


def test_padded_requests_are_cut_off(calls):
    it = made(dummies=3, spare=2)
    assert not it.judge(it.answer(route(it.asked.case)))
    assert len(it.batch.query_ends) == 6
    assert len(calls[0].kwargs["actual_seq_lengths"]) == 3
    assert calls[0].kwargs["query"].shape[0] == 8
    assert calls[0].kwargs["block_table"].shape[0] == 3


@pytest.mark.parametrize(
    ("fields", "change", "sentence"),
    [
        ({"capturing": True}, {}, "not for attend. A graph is being captured"),
        ({}, {"query": 7}, "query has 7 rows, but the last request's queries end at 8"),
        ({"state": "prefill", "contexts": (0,) * 3}, {"key": None}, "there are none"),
        ({}, {"key_cache": None}, "reads the cache, but there is none"),
        ({}, {"table": None}, r"block_table is None, but 3 requests"),
        ({}, {"table": 2}, r"block_table is \[2, \d+\], but 3 requests"),
    ],
)
def test_what_does_not_fit_is_told_so(calls, fields, change, sentence):
    it = made(**fields)
    for name, value in change.items():
        setattr(it, name, getattr(it, name)[:value] if isinstance(value, int) else value)
    # A query that is too short leaves the output as long as it was.
    out = torch.empty(8, 1, 128)
    with pytest.raises(ValueError, match=sentence):
        attend(
            route(it.asked.case),
            Batch([3, 4, 8], it.asked.lens, it.table, 8),
            it.query,
            it.key,
            it.value,
            it.key_cache,
            it.value_cache,
            out,
            num_heads=1,
            num_kv_heads=1,
            head_size=128,
            scale=1.0,
        )
    assert not calls


def test_num_tokens_must_not_cut_a_request():
    with pytest.raises(ValueError, match="request 1 has the queries from 3 to 8"):
        Batch([3, 8], [3, 8], None, 5)
    assert Batch([3, 8], [3], None, 5).end == 3


@pytest.mark.parametrize(
    ("lens", "blocks", "expected"),
    [
        ([16, 16, 16], 3, [(0, 3)]),
        ([16, 17, 16], 3, [(0, 2), (2, 3)]),
        ([0, 48, 0, 1, 0], 3, [(0, 3), (3, 5)]),
        ([48, 48], 3, [(0, 1), (1, 2)]),
        ([], 3, [(0, 0)]),
    ],
)
def test_cuts_hold_no_more_blocks_than_there_are(lens, blocks, expected):
    assert [(cut.start, cut.stop) for cut in cuts(lens, blocks, 16)] == expected
