"""vllm-ascend's MooncakeConnectorV1: everything that it takes from the network, range-checked.

A request's kv_transfer_params come from a proxy, which is to say from whoever can send the server
an HTTP request; messages and metadata come from whoever reaches a port. The releases check neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ascend_patch.impl import kv_limits as limits
from ascend_patch.impl.kv_limits import LimitError as LimitError

# The names of requests: a client may choose its own in X-Request-Id.
MAX_NAME = 4096
# Kinds of cache of one model, each with a list of blocks (0.23 and releases/v0.18.0).
MAX_KINDS = 64
# Prefill ranks of which a request or a message names something.
MAX_RANKS = 4096
MAX_KEEPS_S = 30 * 86400
MAX_ATTEMPT = 64
# Bytes of a message to a prefill rank (a request's name, and some 40 bytes for each rank), and of
# what a rank says of itself (addresses and strides of each layer).
MAX_MESSAGE, MAX_METADATA = limits.MAX_FIELD, limits.MAX_MESSAGE
MAX_FRAMES = 8
# Messages that wait in a queue of one connection.
MAX_QUEUED = 64
NAMED = ("remote_engine_id", "remote_host", "remote_port")


@dataclass(frozen=True)
class Prefill:
    """What a decode server's configuration and release say of prefill servers.

    Attributes:
        tp: Tensor-parallel ranks, where a request does not name them.
        stages: Pipeline stages.
        named_request: Requests bring prefill's name of them (from 0.18).
        kinds: Blocks may be a list for each kind of cache.
    """

    tp: int
    stages: int
    named_request: bool
    kinds: bool


def parameters(given: Mapping[str, Any], prefill: Prefill) -> None:
    """What a request says of the prefill server that it is pulled from.

    Args:
        given: Its kv_transfer_params.

    Raises:
        LimitError: The first field that is missing, of another type or out of range.
    """
    needed = (*NAMED, "remote_request_id") if prefill.named_request else NAMED
    missing = [name for name in (*needed, "remote_block_ids") if not given.get(name)]
    if missing:
        raise LimitError(f"{', '.join(missing)} of kv_transfer_params is missing or empty")
    limits.text("remote_engine_id", given["remote_engine_id"])
    limits.host_name("remote_host", given["remote_host"])
    first = limits.port("remote_port", given["remote_port"])
    if given.get("remote_request_id") is not None:
        limits.text("remote_request_id", given["remote_request_id"], MAX_NAME)
    said = limits.optional("remote_ptp_size", given.get("remote_ptp_size"), 1, limits.MAX_TP)
    tp, stages = said or prefill.tp, prefill.stages
    pcp, dcp = (
        limits.whole(name, given.get(name, 1), 1, limits.MAX_CONTEXT_PARALLEL)
        for name in ("remote_pcp_size", "remote_dcp_size")
    )
    if tp * pcp * stages > MAX_RANKS or dcp > tp:
        raise LimitError(
            f"remote_ptp_size {tp}, remote_pcp_size {pcp} and remote_dcp_size {dcp} with {stages} "
            f"pipeline stages are no prefill server of at most {MAX_RANKS} ranks"
        )
    limits.port("the port of the last prefill rank", first + tp * pcp * stages - 1)
    limits.whole(
        "num_prompt_blocks", given.get("num_prompt_blocks", 0), 0, limits.MAX_REQUEST_BLOCKS
    )
    limits.whole("remote_block_size", given.get("remote_block_size", 0), 0, limits.MAX_BLOCK_SIZE)
    _blocks(given["remote_block_ids"], kinds=prefill.kinds)
    _nodes(given.get("remote_multi_nodes_meta_mapping"))


def _blocks(given: Any, *, kinds: bool) -> None:
    limits.sequence("remote_block_ids", given, limits.MAX_REQUEST_BLOCKS)
    lists = [given]
    if kinds and any(isinstance(one, list | tuple) for one in given):
        lists = list(limits.sequence("remote_block_ids", given, MAX_KINDS))
    total = 0
    for one in lists:
        limits.sequence("remote_block_ids", one, limits.MAX_REQUEST_BLOCKS - total)
        total += len(one)
        for block in one:
            limits.whole("an id of remote_block_ids", block, 0, limits.MAX_NUM_BLOCKS - 1)


def _nodes(given: Any) -> None:
    """Hosts and engines of the ranks of a prefill server on several machines."""
    name = "remote_multi_nodes_meta_mapping"
    if given is None:
        return
    if not isinstance(given, dict) or len(given) > MAX_RANKS:
        raise LimitError(f"{name} is no object of at most {MAX_RANKS} ranks")
    for rank, node in given.items():
        limits.text(f"a rank of {name}", rank, 8)
        if node is None:
            continue
        if not isinstance(node, dict):
            raise LimitError(f"{name} of rank {rank} is no object")
        limits.host_name(f"host of rank {rank} in {name}", node.get("host"))
        limits.text(f"engine_id of rank {rank} in {name}", node.get("engine_id"))


def keeps(given: Any) -> float:
    """Seconds for which a prefill server says that it keeps blocks."""
    if type(given) not in (int, float) or not 0 < given <= MAX_KEEPS_S:
        raise LimitError(f"the seconds that prefill keeps blocks are no number up to {MAX_KEEPS_S}")
    return float(given)


def attempt(given: Any) -> str:
    """What prefill drew for one attempt of a request."""
    return limits.text("the attempt of a request", given, MAX_ATTEMPT)


@dataclass(frozen=True)
class Done:
    """A decode rank has ended its read of a request, well or not.

    Attributes:
        request: Prefill's name of it.
        needed: Decode ranks that the sender says have to say so.
        reader: Which one this is; empty without the shim there.
        attempt: What prefill drew for this attempt; empty if decode was not told.
    """

    request: str
    needed: int = 1
    reader: str = ""
    attempt: str = ""


class Part(msgspec.Struct, gc=False):
    """Of a message that a read has ended: the readers of one port, or what the shim adds.

    Many of them start no collection, which takes a third of a second where torch is loaded.
    """

    num: int | None = None
    reader: str = ""
    attempt: str = ""


class Message(msgspec.Struct, array_like=True):
    """A message to a prefill rank: (kind, request, counts of readers by port, the shim's).

    0.11 sends no counts; the shim's part is the last one, or missing; its question has the attempt
    in their place. Whatever is of another type is refused where it begins: a decoder that takes
    anything builds 65,000 lists for 64 KiB.
    """

    kind: bytes
    request: str = ""
    third: dict[int | str, Part] | str = msgspec.field(default_factory=dict)
    fourth: dict[int | str, Part] = msgspec.field(default_factory=dict)


def done(message: Message, port: int, field: str) -> Done:
    """A message that a read has ended.

    Args:
        port: The one of this prefill rank.
        field: The name of the shim's part.
    """
    request = limits.text("the request", message.request, MAX_NAME)
    needed, reader, drawn = 1, "", ""
    for part in (message.third, message.fourth):
        if not isinstance(part, dict) or len(part) > MAX_RANKS:
            raise LimitError(f"a message of {request!r} has no counts of readers where they belong")
        if field in part:
            reader = limits.text("the reader", part[field].reader, least=0)
            drawn = limits.text("the attempt", part[field].attempt, MAX_ATTEMPT, least=0)
        elif part:
            here = part.get(port)
            if here is None:
                raise LimitError(f"a message of {request!r} counts no readers of port {port}")
            needed = max(1, limits.whole("the readers of a rank", here.num, 0, MAX_RANKS))
    return Done(request, needed, reader, drawn)


@dataclass(frozen=True)
class Metadata:
    """What a prefill rank said of itself, as far as it is needed later.

    Attributes:
        host: Who said it.
        num_blocks: Blocks of its caches.
        regions: Registered regions; of each layer in 0.23.
        answers: It can be asked whether it still has a request's blocks.
    """

    host: str
    num_blocks: int
    regions: tuple[int, ...]
    answers: bool


def metadata(found: Any, host: str, *, answers: Any = 0) -> Metadata:
    """Range checks of MooncakeAgentMetadata.

    Raises:
        LimitError: An address, size or number cannot be.
    """
    limits.text("engine_id", found.engine_id)
    limits.port("te_rpc_port", found.te_rpc_port)
    blocks = limits.whole("num_blocks", found.num_blocks, 1, limits.MAX_NUM_BLOCKS)
    bases = limits.sequence("kv_caches_base_addr", found.kv_caches_base_addr, limits.MAX_REGIONS)
    if hasattr(found, "block_strides"):
        regions = tuple(_layers(found, bases, blocks))
    else:
        for base in bases:
            limits.whole("an address of kv_caches_base_addr", base, 1, limits.ADDRESS_END - 1)
        regions = (len(bases),)
    return Metadata(host, blocks, regions, answers == 1)


def _layers(found: Any, bases: Sequence[Any], blocks: int) -> list[int]:
    """0.23: addresses, and the bytes from one block to the next, of each layer's caches."""
    limits.whole("block_size", found.block_size, 1, limits.MAX_BLOCK_SIZE)
    strides = limits.sequence("block_strides", found.block_strides, limits.MAX_REGIONS)
    if len(strides) != len(bases):
        raise LimitError(
            f"there are {len(bases)} layers of addresses and {len(strides)} of strides"
        )
    counts = []
    for layer, (addresses, steps) in enumerate(zip(bases, strides, strict=True)):
        limits.sequence(f"addresses of layer {layer}", addresses, limits.MAX_PARTS)
        if not isinstance(steps, list | tuple) or len(steps) != len(addresses):
            raise LimitError(f"layer {layer} has {len(addresses)} addresses and other strides")
        for address, step in zip(addresses, steps, strict=True):
            limits.whole(f"a stride of layer {layer}", step, 1, 1 << 40)
            most = limits.ADDRESS_END - blocks * step
            limits.whole(f"an address of layer {layer}", address, 1, most)
        counts.append(len(addresses))
    return counts


def reads(known: Metadata, remote_blocks: Sequence[int], engine: str) -> None:
    """Whether blocks that a request names are blocks of that prefill rank.

    Raises:
        LimitError: One of them lies behind its caches.
    """
    highest = max(remote_blocks, default=0)
    if highest >= known.num_blocks:
        raise LimitError(
            f"the request names block {highest} of {engine}, which has {known.num_blocks}; its "
            "kv_transfer_params are of another server, or were changed on their way"
        )
