"""vLLM 0.19 to 0.29: which prefill rank sends which part of a block, replicas included.

The oracle counts heads: each byte of a decode block comes from a rank that holds its head, once.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ascend_patch.impl import kv_vllm_shares

HEAD = 256
SIZES = [
    (p, d, h)
    for p in (1, 2, 4, 8, 16)
    for d in (1, 2, 4, 8, 16)
    for h in (1, 2, 4, 8)
    # Fewer prefill ranks than heads, and more decode ranks: the release refuses their lengths.
    if not p < h < d
]


def held(rank: int, tp: int, heads: int) -> range:
    """vLLM's QKVParallelLinear: ranks cut the heads, or each head is on equally many of them."""
    if tp >= heads:
        return range(rank * heads // tp, rank * heads // tp + 1)
    return range(rank * heads // tp, (rank + 1) * heads // tp)


def released(
    local_tp_rank, local_tp_size, remote_tp_rank, remote_tp_size, local_kv_block_len,
    remote_kv_block_len, producer_cache_replicated,
):  # fmt: skip
    """What vLLM 0.19 to 0.29 do, of their own words."""
    if local_tp_size == remote_tp_size:
        return True, 0, 0, local_kv_block_len
    if local_tp_size > remote_tp_size:
        part = local_tp_rank % (local_tp_size // remote_tp_size)
        if producer_cache_replicated:
            return part == 0, 0, 0, local_kv_block_len
        return True, 0, part * local_kv_block_len, local_kv_block_len
    if producer_cache_replicated:
        return True, 0, 0, local_kv_block_len
    part = remote_tp_rank % (remote_tp_size // local_tp_size)
    return True, part * remote_kv_block_len, 0, remote_kv_block_len


def missing(plan, prefill: int, decode: int, heads: int) -> int:
    """How many heads of decode ranks do not arrive, arrive twice, or are another head."""
    wrong = 0
    for there in range(decode):
        wanted = held(there, decode, heads)
        found: dict[int, list[int]] = {}
        ratio = max(1, prefill // decode)
        first = there * prefill // decode
        for here in range(first, first + ratio):
            own = held(here, prefill, heads)
            sends, source, target, length = plan(
                here, prefill, there, decode, HEAD * len(own), HEAD * len(wanted), prefill >= heads
            )
            if sends:
                for i in range(length // HEAD):
                    found.setdefault(target // HEAD + i, []).append(own[source // HEAD + i])
        wrong += sum(found.get(i) != [head] for i, head in enumerate(wanted))
    return wrong


def ours(*args):
    return kv_vllm_shares.sender_transfer_plan(released, None, args, {})


@pytest.mark.parametrize(("prefill", "decode", "heads"), SIZES)
def test_each_head_arrives_once_in_its_place(prefill, decode, heads) -> None:
    assert missing(ours, prefill, decode, heads) == 0


def test_the_release_leaves_heads_out() -> None:
    assert missing(released, 4, 1, 2) == 1
    assert missing(released, 16, 2, 8) == 6


def regions(*lengths):
    return [SimpleNamespace(kv_block_len=length) for length in lengths]


@pytest.mark.parametrize(
    ("here", "there", "sizes", "fits"),
    [
        ((256,), (512,), (4, 1), True),
        ((256,), (256,), (4, 2), True),
        ((256,), (1024,), (4, 1), True),
        ((256,), (2048,), (4, 1), False),
        ((256,), (384,), (4, 1), False),
        ((256,), (512,), (1, 2), False),
        ((256, 256), (512, 640), (4, 1), False),
    ],
)
def test_lengths_are_checked_where_heads_are_replicas(here, there, sizes, fits) -> None:
    found = kv_vllm_shares.region_lengths(
        lambda *_: None, None, (regions(*here), regions(*there), *sizes, True), {}
    )
    assert (found is None) == fits
    if found:
        assert f"prefill TP {sizes[0]} -> decode TP {sizes[1]}" in found


def test_what_the_release_refuses_stays_refused() -> None:
    given = (regions(1), regions(1), 1, 1, True)
    assert kv_vllm_shares.region_lengths(lambda *_: "no", None, given, {}) == "no"
