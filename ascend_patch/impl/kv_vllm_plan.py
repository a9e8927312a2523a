"""Plans of a pair of servers in vLLM's terms: one pipeline stage, and prefill pushes."""

from __future__ import annotations

import zlib

from ascend_patch.kernels.kv_layout import (
    PUSH,
    Plan,
    Refusal,
    Side,
    Topology,
    plan_transfers,
)


def plan_of(prefill: Side, decode: Side, transfer_id: str) -> Plan | Refusal:
    """How a request comes from one server to the other; both sides come to the same plan."""
    for name, one in (("prefill", prefill), ("decode", decode)):
        if one.pp > 1:
            return Refusal(
                "pipeline",
                f"{Topology(prefill, decode).ratio}: {name} has {one.pp} pipeline stages, and "
                "vLLM's Mooncake connector takes 1; set --pipeline-parallel-size 1",
            )
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
