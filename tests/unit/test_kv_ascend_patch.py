"""What vllm-ascend's decode ranks check and report; on the real classes: tests/ascend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.kernels.kv_layout import LayerGroup, Side


def side(tp: int, heads: int, **given) -> Side:
    return Side((LayerGroup(2, heads, (8, 8)),), tp, **given)


def test_blocks_are_invalid_when_the_request_has_finished_and_settled(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(failures.time, "monotonic", lambda: now[0])
    state = failures.Failures()
    state.add("one", [3, 4])
    assert state.failed("one")
    assert not state.failed("two")
    assert state.release({"two"}) == {"two"}
    assert state.take_invalid() == set()
    # Finished, and something may still be written.
    assert state.release({"one", "three"}) == {"three"}
    assert state.take_invalid() == set()
    now[0] += failures.SETTLE_S
    assert state.release(set()) == {"one"}
    assert state.take_invalid() == {3, 4}
    assert state.take_invalid() == set()
    assert state.release(set()) == set()
    assert not state.failed("one")


def test_a_request_that_has_settled_is_not_released_before_it_has_finished(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(failures.time, "monotonic", lambda: now[0])
    state = failures.Failures()
    state.add("one", [3])
    state.add("one", [4], settle_s=0.0)
    now[0] += 60
    assert state.release(set()) == set()
    assert state.take_invalid() == set()
    assert state.release({"one"}) == {"one"}
    assert state.take_invalid() == {3, 4}


@pytest.mark.parametrize(
    ("sizes", "chosen", "pulls", "says"),
    [
        ((4, 2, 4), [[0, 1], [2, 3]], 2, None),
        ((8, 2, 4), [[1, 3], [5, 7]], 2, None),
        ((4, 2, 4), [[1, 0], [2, 3]], 2, "needs KV heads 0 to 0 of stage 0, and prefill rank 1"),
        ((4, 2, 4), [[0, 2], [2, 3]], 2, "needs KV heads 1 to 1 of stage 0, and prefill rank 2"),
        ((4, 2, 4), [[0], [2]], 1, "would pull 1 times 1"),
        ((4, 2, 4), [[0, 1]], 2, "chosen for 1 decode ranks, not 2"),
        ((8, 3, 8), [[0, 1], [2, 3], [4, 5]], 2, "cannot be cut or replicated evenly to 3 decode"),
        ((6, 4, 8), [[0], [1], [2], [3]], 2, "cannot be cut or replicated evenly to 6 prefill"),
        ((2, 4, 4), [[0], [0], [1], [1]], 0, "would pull 0 times 2"),
    ],
)
def test_ranks_must_hold_the_shards_that_they_are_pulled_to(sizes, chosen, pulls, says):
    prefill, decode, heads = sizes
    found = checks.wrong_ranks(side(prefill, heads), side(decode, heads), chosen, 0, pulls)
    assert (found is None) == (says is None), found
    if found is not None:
        assert says in found
        assert found.startswith(f"prefill TP {prefill} -> decode TP {decode}: ")


def test_stages_come_one_after_the_other():
    decode = side(2, 4)
    prefill = checks.peer_side(decode, tp=4, pp=2, partition="1,1")
    right = [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [checks.wrong_ranks(prefill, decode, right, rank, 2) for rank in (0, 1)] == [None, None]
    found = checks.wrong_ranks(prefill, decode, [[0, 1, 0, 1], right[1]], 0, 2)
    assert "needs KV heads 0 to 0 of stage 1" in (found or "")


@pytest.mark.parametrize(
    ("peer", "assumed", "says"),
    [
        (side(4, 4), 4, None),
        (side(4, 4), None, None),
        (side(4, 4), 2, "says 2; set it to 4"),
        (side(4, 4, dtype="float16"), 4, "dtype of the cache: prefill has float16"),
        (side(4, 8), 4, "8 KV heads"),
        (side(4, 4, block_size=64), 4, "block size: prefill has 64, decode 128"),
        (side(4, 4, pp=2), 4, "prefill.pp_size of decode's kv_connector_extra_config says 1"),
    ],
)
def test_what_a_prefill_rank_says_is_compared(peer, assumed, says):
    found = checks.heard(peer, side(2, 4), assumed, 1)
    assert (found is None) == (says is None), found
    assert says is None or says in found


def config(**parallel) -> SimpleNamespace:
    text = SimpleNamespace(num_key_value_heads=4, num_hidden_layers=2)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(hf_text_config=text, is_deepseek_mla=False),
        cache_config=SimpleNamespace(block_size=16),
    )


def caches(*shapes, dtype=torch.bfloat16):
    return {f"layer {n}": tuple(torch.empty(s, dtype=dtype) for s in shapes) for n in range(2)}


def test_a_side_is_read_from_the_caches():
    shape = (3, 16, 2, 8)
    found = checks.side_of(config(), caches(shape, shape), tp=2, pp=1)
    assert found == side(2, 4, block_size=16, dtype="bfloat16", itemsize=2)
    # The other shape that the releases know.
    flat = checks.side_of(config(), caches((3, 16, 16), (3, 16, 16)), tp=2, pp=1)
    assert flat == found


def test_what_is_the_releases_own_has_no_side():
    shape = (3, 16, 2, 8)
    int8 = caches(shape, shape, dtype=torch.int8)
    assert checks.side_of(config(), int8, tp=2, pp=1) is None
    split = config(decode_context_parallel_size=2)
    assert checks.side_of(split, caches(shape, shape), tp=2, pp=1) is None
    mixed = caches(shape, shape) | {"mamba": (torch.empty(3, 5), torch.empty(3, 7))}
    assert checks.side_of(config(), mixed, tp=2, pp=1) is None
