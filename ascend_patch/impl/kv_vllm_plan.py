"""Plans of a pair of servers in vLLM's terms: one pipeline stage, and prefill pushes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from ascend_patch.kernels.kv_layout import (
    PUSH,
    Plan,
    Refusal,
    Side,
    Topology,
    descriptors,
    match_blocks,
    plan_transfers,
)


def plan_of(prefill: Side, decode: Side, transfer_id: str) -> Plan | Refusal:
    """How a request comes from one server to the other; both sides come to the same plan."""
    # The plan is the same for turns that are equal modulo prefill's TP: fewer to keep.
    turn = zlib.crc32(transfer_id.encode()) % max(prefill.tp, 1)
    # Equal sizes go rank by rank, replicas too: so does an unpatched peer.
    equal = tuple((rank,) for rank in range(prefill.tp)) if prefill.tp == decode.tp else None
    return plan_transfers(Topology(prefill, decode, equal), direction=PUSH, turn=turn)


def asked_by(plan: Plan, prefill_rank: int) -> tuple[int, ...]:
    """The decode ranks that a prefill rank hears of for each request; then it frees its blocks.

    A rank whose heads come from a replica of it is asked by one decode rank, for nothing.
    """
    return plan.targets(prefill_rank) or (prefill_rank % plan.topology.decode.tp,)


def asks(plan: Plan, decode_rank: int) -> dict[int, bool]:
    """The prefill ranks that a decode rank asks -> whether they have something to send."""
    sources = plan.sources(decode_rank)
    found = dict.fromkeys(sources, True)
    for rank in plan.idle_prefill_ranks:
        if decode_rank in asked_by(plan, rank):
            found[rank] = False
    return found


def ranges(
    plan: Plan,
    prefill_rank: int,
    decode_rank: int,
    *,
    prefill_blocks: Sequence[int],
    decode_blocks: Sequence[int],
    tokens: int | None,
    cached_blocks: int | None,
    prefill_bases: Sequence[int],
    decode_bases: Sequence[int],
    prefill_num_blocks: int,
    decode_num_blocks: int | None,
) -> tuple[list[int], list[int], list[int]]:
    """Addresses here, addresses there and lengths, as Mooncake's engine takes them.

    Raises:
        ValueError: The blocks do not belong together; see `match_blocks` and `descriptors`.
    """
    pairs = match_blocks(
        plan.topology, prefill_blocks, decode_blocks, tokens=tokens, cached_blocks=cached_blocks
    )
    found = descriptors(
        plan,
        prefill_rank,
        decode_rank,
        pairs,
        prefill_bases=prefill_bases,
        decode_bases=decode_bases,
        prefill_num_blocks=prefill_num_blocks,
        decode_num_blocks=decode_num_blocks,
    )
    return found.lists()
