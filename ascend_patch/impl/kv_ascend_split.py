"""vllm-ascend's MooncakeConnectorV1, decode ranks that read some of the heads of a prefill rank.

A prefill rank has a token's heads side by side, and several decode ranks read from it: whole blocks
through a buffer, from which each takes its heads (`kernels.kv_layout.staged`). The prefill rank
counts its readers, as the release has it for context parallel, and frees the blocks after the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import kv_handshake, kv_limits
from ascend_patch.kernels.kv_layout import (
    PULL,
    LayerGroup,
    Plan,
    Refusal,
    Side,
    Topology,
    copy_staged,
    descriptors,
    least_staging,
    match_blocks,
    plan_transfers,
    staged_rounds,
)

NAME = "ascend_patch_split"
# Of the buffer. A block of a layer is some 100 KiB, and a range costs as much as some of them.
BUFFER_BYTES = 16 << 20
MOST_GIVEN_UP = 8
# As the releases align caches that their transfer engine registers.
ALIGNMENT = 2 << 20
# The engine's answer is raised before anything is laid out anew, so that pulling again is safe.
ENGINE_FAILED = "Mooncake transfer failed"


@dataclass
class GivenUp:
    """A buffer to which a read that the engine gave up may write.

    Attributes:
        rank: The prefill rank that is read from: host, port.
        buffer: It stays registered.
        free_at: From when on it may be used, by time.monotonic.
    """

    rank: tuple[str, int]
    buffer: Tensor
    free_at: float = math.inf


@dataclass
class Splits:
    """Of a receiving thread: what it reads by a plan, and its buffers.

    Attributes:
        side: The decode server's.
        rank: The decode rank.
        pulls: The plan and the prefill rank of each pull, by request and port.
        buffers: The last one is used; the others, if any, were too small, and stay registered.
        given_up: Buffers to which a read that the engine gave up may write still.
    """

    side: Side
    rank: int
    pulls: dict[tuple[str, int], tuple[Plan, int]] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)
    given_up: list[GivenUp] = field(default_factory=list)


def planned(prefill: Side, decode: Side, turn: int) -> Plan | Refusal:
    """Who reads what of a request; ``turn`` spreads decode ranks over replicas."""
    return plan_transfers(Topology(prefill, decode), direction=PULL, turn=turn % prefill.tp)


def readers(plan: Plan) -> tuple[int, ...]:
    """How many decode ranks read from each prefill rank."""
    return tuple(len(plan.targets(rank)) for rank in range(plan.topology.prefill.world))


def all_wait(prefill: Side, said: int | None) -> bool:
    """Whether each prefill rank keeps a request's blocks until it has been read.

    One that the release's choice leaves out frees them at once.

    Args:
        said: decode.tp_size of the prefill server's configuration, if it is known. Without the shim
            it is at most prefill's TP.
    """
    if said is not None and said >= prefill.tp:
        return True
    replicas = any(len(prefill.heads(group, 0).ranks) > 1 for group in prefill.groups)
    sizes = range(1, prefill.tp + 1) if said is None else (said,)
    return prefill.tp == 1 or (not replicas and all(prefill.tp % size == 0 for size in sizes))


def read(thread: Any, req_meta: dict[str, Any], plan: Plan, prefill_rank: int) -> None:
    """A pull of a planned request, in place of the release's _transfer_kv_cache.

    Raises:
        HandshakeError: The prefill server is not what the plan was made for.
        ValueError: What was registered on a side is not what the plan says of it.
        RuntimeError: The transfer engine failed.
    """
    state: Splits = getattr(thread, NAME)
    local, remote = req_meta["local_block_ids"], req_meta["remote_block_ids"]
    if not local:
        return
    if len(local) > len(remote):
        raise ValueError(f"{len(local)} blocks are wanted and prefill has {len(remote)}")
    engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    if port not in thread.kv_caches_base_addr[engine]:
        thread._get_remote_metadata(req_meta["remote_host"], port)
    reason = _does_not_fit(thread.decoder.told.get(engine), plan)
    if reason is not None:
        raise kv_handshake.HandshakeError(reason)
    bases = thread.kv_caches_base_addr[engine].get(port)
    if bases is None:
        raise kv_handshake.HandshakeError(f"the server at this address is not {engine} any more")
    caches = [cache for layer in thread.kv_caches.values() for cache in layer]
    plan = _with_draft(plan, prefill_rank, len(bases), len(caches))
    pairs = match_blocks(plan.topology, remote[-len(local) :], local)
    theirs = bases[: len(plan.topology.prefill.regions(prefill_rank))]
    ours = [cache.data_ptr() for cache in caches][: len(plan.topology.decode.regions(state.rank))]
    session = kv_limits.session(req_meta["remote_host"], thread.remote_te_port[engine][port])

    def fetch(batches: Iterator[tuple[list[int], list[int], list[int]]]) -> None:
        for batch in batches:
            code = thread.engine.batch_transfer_sync_read(session, *batch)
            if code < 0:
                raise RuntimeError(f"{ENGINE_FAILED}, ret: {code}")

    found = descriptors(
        plan,
        prefill_rank,
        state.rank,
        pairs,
        prefill_bases=theirs,
        decode_bases=ours,
        decode_num_blocks=caches[0].shape[0],
        staged=True,
    )
    fetch(found.batches())
    least = least_staging(plan)
    if not least:
        return
    buffer = _buffer(state, thread.engine, caches[0].device, least)
    rounds = staged_rounds(
        plan,
        prefill_rank,
        state.rank,
        pairs,
        prefill_bases=theirs,
        decode_bases=ours,
        staging_base=buffer.data_ptr(),
        staging_bytes=buffer.numel(),
    )
    for one in rounds:
        fetch(one.ranges.batches())
        copy_staged(one, caches, buffer)
        if buffer.device.type == "npu":
            torch.npu.synchronize()


def _does_not_fit(told: Any, plan: Plan) -> str | None:
    """Why a prefill server is not to be read from by this plan; None if it is.

    Args:
        told: What it said: its side, and decode.tp_size of its configuration; None without the
            shim.
    """
    prefill, decode, ratio = plan.topology.prefill, plan.topology.decode, plan.topology.ratio
    if told is None:
        return None if all_wait(prefill, None) else kv_handshake.both_sides(ratio, "prefill")
    side, said = told
    if (side.tp, side.stage_layers) != (prefill.tp, prefill.stage_layers):
        return (
            f"{ratio}: the prefill server has TP {side.tp} and stages of {side.stage_layers} "
            f"layers, and decode was told {prefill.tp} and {prefill.stage_layers}; set prefill's "
            "sizes in decode's kv_connector_extra_config"
        )
    if said is None or not all_wait(prefill, said):
        return (
            f"{ratio}: decode.tp_size of prefill's kv_connector_extra_config says {said}, and some "
            f"of its ranks would not wait; set it to {decode.tp}"
        )
    return None


def _with_draft(plan: Plan, prefill_rank: int, theirs: int, ours: int) -> Plan:
    """The plan with the layer of a draft model, where both sides have one (MTP, EAGLE).

    Draft layers are the last ones of the last stage, and share one cache.
    """
    prefill, decode = plan.topology.prefill, plan.topology.decode
    parts = len(decode.groups[0].widths)
    if prefill_rank // prefill.tp < prefill.pp - 1:
        return plan
    if min(theirs - len(prefill.regions(prefill_rank)), ours - len(decode.regions(0))) < parts:
        return plan
    found = planned(_drafted(prefill), _drafted(decode), plan.turn)
    if isinstance(found, Refusal):
        raise ValueError(found.sentence)
    return found


def _drafted(side: Side) -> Side:
    group = side.groups[0]
    draft = LayerGroup(1, group.kv_heads, group.widths, "draft", draft=True)
    return replace(side, groups=(group, draft))


def give_up(thread: Any, req_meta: dict[str, Any]) -> None:
    """A read into the buffer was given up: nothing else may be read there while it may write."""
    state: Splits = getattr(thread, NAME)
    if state.buffers:
        rank = req_meta["remote_host"], req_meta["remote_handshake_port"]
        state.given_up.append(GivenUp(rank, state.buffers.pop()))


def wrote(thread: Any, rank: tuple[str, int], settle_s: float) -> None:
    """Reads from a prefill rank that were given up write no more after so many seconds."""
    state: Splits | None = thread.__dict__.get(NAME)
    for one in state.given_up if state is not None else ():
        if one.rank == rank:
            one.free_at = min(one.free_at, time.monotonic() + settle_s)


def _buffer(state: Splits, engine: Any, device: torch.device, least: int) -> Tensor:
    """The thread's buffer, made and registered when it is first needed.

    Raises:
        RuntimeError: The engine does not register one, or too many may be written to still.
    """
    now = time.monotonic()
    state.buffers += [one.buffer for one in state.given_up if one.free_at <= now]
    state.buffers.sort(key=torch.Tensor.numel)
    state.given_up = [one for one in state.given_up if one.free_at > now]
    if len(state.given_up) >= MOST_GIVEN_UP:
        raise RuntimeError(
            f"{len(state.given_up)} buffers are kept for prefill ranks that stopped in the middle "
            "of a read and may go on with it; start those ranks again, or this server"
        )
    if not state.buffers or state.buffers[-1].numel() < least:
        size = max(BUFFER_BYTES, -(-least // ALIGNMENT) * ALIGNMENT)
        whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
        buffer = whole[-whole.data_ptr() % ALIGNMENT :][:size]
        code = engine.register_memory(buffer.data_ptr(), size)
        if code != 0:
            raise RuntimeError(f"the transfer engine cannot register a buffer of {size} bytes")
        state.buffers.append(buffer)
    return state.buffers[-1]


def counts_alike(thread: Any, side: Side) -> bool:
    """Whether a block is as long in each region as the decode rank's release counts it."""
    found: Sequence[int] = getattr(thread, "block_len_per_addr", None) or thread.block_len
    wanted = side.regions(0)
    return all(found[n % len(found)] == size for n, size in enumerate(wanted))
