"""Prefill and decode ranks in one process: vLLM's real worker class, and memory for an engine.

Real are the host's class, the listeners, ZMQ sockets over the loopback interface and its
message formats; not real is Mooncake's engine, which copies between tensors of this process.
"""

from __future__ import annotations

import asyncio
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from kv_engine import Engine

from ascend_patch.impl import kv_vllm, kv_vllm_listen, kv_vllm_wire
from ascend_patch.impl.kv_vllm_receive import Receiver
from ascend_patch.impl.kv_vllm_send import Sender
from ascend_patch.kernels.kv_layout import LayerGroup, Side

LAYERS, BLOCKS, TOKENS, WIDTH = 2, 9, 4, 8
PREFILL = "prefill-engine"
# Of a request of three blocks, on either side.
P_BLOCKS, D_BLOCKS = [1, 2, 5], [7, 3, 4]
RATIOS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4))


def side(tp: int, heads: int, layout: str) -> Side:
    """A model's side of this size."""
    group = LayerGroup(LAYERS, heads, (WIDTH, WIDTH))
    return Side((group,), tp, block_size=TOKENS, layout=layout, dtype="float32", itemsize=4)


def truth(heads: int, request: int, blocks: int) -> torch.Tensor:
    """What a request's cache holds: [layers, 2, blocks, tokens, heads, width], all different."""
    shape = (LAYERS, 2, blocks, TOKENS, heads, WIDTH)
    return torch.arange(torch.Size(shape).numel()).view(shape).float() + 1e4 * request


class Rank:
    """One rank: its caches, NHD views of them, and the host's worker."""

    def __init__(self, host: Any, one: Side, rank: int, role: str, engine: Any) -> None:
        self.host, self.side, self.number = host, one, rank
        self.heads = one.heads(one.groups[0], rank)
        shape = [2 * LAYERS, BLOCKS, TOKENS, self.heads.count, WIDTH]
        if one.layout == "HND":
            shape[2], shape[3] = shape[3], shape[2]
        cache = torch.full(shape, float("nan"))
        self.cache = cache.transpose(2, 3) if one.layout == "HND" else cache
        self.engine = engine
        # Not the host's __del__, which ends threads that are not there.
        kind = type("Worker", (host.MooncakeConnectorWorker,), {"__del__": lambda _: None})
        self.worker = worker = kind.__new__(kind)
        worker.engine, worker.hostname = engine, "127.0.0.1"
        worker.rpc_port = engine.get_rpc_port()
        worker.engine_id = PREFILL if role == "kv_producer" else "decode-engine"
        worker.tp_rank, worker.tp_size, worker.num_blocks = rank, one.tp, BLOCKS
        extra = types.SimpleNamespace(kv_connector_extra_config={"mooncake_protocol": "tcp"})
        worker.vllm_config = types.SimpleNamespace(kv_transfer_config=extra)
        worker.kv_caches_base_addr = [part.data_ptr() for part in cache]
        worker.block_len = cache[0, 0].nbytes
        lengths = [part.nbytes for part in cache]
        assert engine.batch_register_memory(worker.kv_caches_base_addr, lengths) == 0
        worker.reqs_need_send = {}
        worker.finished_sending_reqs, worker.finished_recving_reqs = set(), set()
        worker.is_kv_producer = role == "kv_producer"
        worker.is_kv_consumer = not worker.is_kv_producer
        worker.num_sender_tasks = 4
        worker._encoder = host.msgspec.msgpack.Encoder()
        worker._xfer_meta_decoder = host.msgspec.msgpack.Decoder(host.MooncakeXferMetadata)
        worker._xfer_resp_decoder = host.msgspec.msgpack.Decoder(host.MooncakeXferResponse)
        worker.kv_topo = types.SimpleNamespace(
            get_target_remote_ranks=lambda tp: [rank] if tp == one.tp else [rank, rank + 1]
        )

    def blocks(self, ids: list[int]) -> torch.Tensor:
        """The blocks as [layers, 2, blocks, tokens, heads, width]."""
        return self.cache[:, ids].unflatten(0, (LAYERS, 2))

    def fill(self, ids: list[int], found: torch.Tensor) -> None:
        """Write what prefill computes: this rank's heads."""
        mine = found[..., self.heads.first : self.heads.end, :]
        self.cache[:, ids] = mine.flatten(0, 1)


class World:
    """A prefill and a decode server's ranks, in the running loop."""

    def __init__(
        self,
        host: Any,
        prefill_tp: int,
        decode_tp: int,
        *,
        heads: int = 4,
        layout: str = "NHD",
        prefill_layout: str = "",
        patched: tuple[bool, bool] = (True, True),
        timeout: float = 10,
        retries: int = 2,
        engines: tuple[Callable[[], Any], Callable[[], Any]] = (Engine, Engine),
    ) -> None:
        import zmq.asyncio

        self.host, self.heads, self.patched = host, heads, patched
        self.context = zmq.asyncio.Context()
        prefill, decode = (
            side(prefill_tp, heads, prefill_layout or layout),
            side(decode_tp, heads, layout),
        )
        sides = (prefill, "kv_producer", engines[0]), (decode, "kv_consumer", engines[1])
        self.prefill, self.decode = (
            [Rank(host, one, rank, role, engine()) for rank in range(one.tp)]
            for one, role, engine in sides
        )
        self.executor = ThreadPoolExecutor(4)
        self.listening: list[Any] = []
        self.addresses: dict[int, str] = {}
        self.receivers: list[Receiver] = []
        for rank in self.decode:
            rank.worker.async_zmq_ctx = self.context
            receiver = Receiver(
                rank.worker,
                decode,
                "model",
                timeout=timeout,
                retries=retries,
                views=list(rank.cache),
            )
            receiver._query = self.query  # type: ignore[method-assign]
            self.receivers.append(receiver)

    async def query(self, address: str) -> dict[str, dict[int, str]]:
        """What the bootstrap server says."""
        return {PREFILL: dict(self.addresses)}

    async def __aenter__(self) -> World:
        for rank in self.prefill:
            await self.listen(rank)
        return self

    async def listen(self, rank: Rank) -> None:
        """Start the host's own listener of a prefill rank."""
        worker, loop = rank.worker, asyncio.get_running_loop()
        worker.async_zmq_ctx, worker.sender_loop = self.context, loop
        worker._sender_executor = self.executor
        worker.sender_worker_queue = asyncio.Queue()

        async def register() -> None:
            self.addresses[rank.number] = f"tcp://127.0.0.1:{worker.side_channel_port}"

        worker.register_worker_with_bootstrap = register
        if self.patched[0]:
            new = self.host.SendBlockMeta

            def new_request(transfer: str) -> Any:
                return new("", transfer, [], asyncio.Event())

            sender = Sender(
                worker,
                rank.side,
                "model",
                timeout=10,
                new_request=new_request,
                views=list(rank.cache),
            )
            setattr(worker, kv_vllm.SENDER, sender)
            worker._xfer_meta_decoder = kv_vllm_wire.ask_decoder()
            blocks = worker._send_blocks
            worker._send_blocks = lambda *args: kv_vllm.send_blocks(blocks, worker, args, {})
            theirs = worker.send_kv_to_decode
            worker.send_kv_to_decode = lambda *args: kv_vllm.send_kv_to_decode(
                theirs, worker, args, {}
            )
            theirs_too = worker.record_send_reqs
            worker.record_send_reqs = lambda *args: kv_vllm.record_send_reqs(
                theirs_too, worker, args, {}
            )
        ready = threading.Event()
        listen = (
            kv_vllm_listen.Listener(worker).run
            if self.patched[0]
            else worker._mooncake_sender_listener
        )
        self.listening.append(asyncio.ensure_future(listen(ready)))
        await wait_until(ready.is_set)
        if self.patched[0]:
            # Here a process ends when its side channel does.
            sender.said["process_port"] = worker.side_channel_port

    async def __aexit__(self, *error: object) -> None:
        for task in self.listening:
            task.cancel()
        await asyncio.gather(*self.listening, return_exceptions=True)
        for rank in self.prefill:
            if isinstance(rank.engine, Engine):
                rank.engine.hold.set()
        self.executor.shutdown()
        pending = [task for one in self.receivers for task in one._tasks]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self.context.destroy(0)

    async def prefilled(self, number: int, blocks: list[int]) -> None:
        """A request has been computed on all prefill ranks."""
        found = truth(self.heads, number, len(blocks))
        for rank in self.prefill:
            rank.fill(blocks, found)
            await self.record(rank, number, [])
            await self.record(rank, number, blocks)

    async def record(self, rank: Rank, number: int, blocks: list[int]) -> None:
        """What vLLM's scheduler tells a prefill rank."""
        metadata = self.host.MooncakeConnectorMetadata()
        metadata.reqs_to_send[f"p{number}"] = (f"t{number}", blocks)
        await rank.worker.record_send_reqs(metadata)

    def meta(self, number: int, blocks: list[int], **noted: int) -> Any:
        """What vLLM's scheduler tells a decode rank."""
        found = self.host.PullReqMeta(f"d{number}", f"t{number}", blocks, PREFILL, "http://none")
        found.__dict__.update(noted)
        return found

    async def pull(self, number: int, blocks: list[int], **noted: int) -> None:
        """Start to pull a request on all decode ranks."""
        for receiver in self.receivers:
            await receiver.start({PREFILL: {f"d{number}": self.meta(number, blocks, **noted)}})

    def pulled(self, number: int) -> bool:
        """Whether all decode ranks have reported it as finished."""
        return all(f"d{number}" in rank.worker.finished_recving_reqs for rank in self.decode)

    def freed(self, number: int) -> bool:
        """Whether all prefill ranks have reported its blocks as free."""
        return all(f"p{number}" in rank.worker.finished_sending_reqs for rank in self.prefill)

    def right(self, number: int, blocks: list[int]) -> bool:
        """Whether the blocks hold what decode would have computed itself."""
        found = truth(self.heads, number, len(blocks))
        return all(
            torch.equal(r.blocks(blocks), found[..., r.heads.first : r.heads.end, :])
            for r in self.decode
        )

    def invalid(self) -> set[int]:
        """Blocks that decode ranks have newly reported as not loaded."""
        return set().union(*(one.take_invalid() for one in self.receivers))

    def untouched(self, blocks: list[int]) -> bool:
        """Whether nobody has written to other blocks than these."""
        others = [i for i in range(BLOCKS) if i not in blocks]
        return all(bool(rank.cache[:, others].isnan().all()) for rank in self.decode)


async def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait, in a bounded time, for what another task does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        await asyncio.sleep(0.01)


def with_side(world: World, **changes: Any) -> None:
    """Let the prefill ranks say that they are otherwise."""
    for rank in world.prefill:
        sender = getattr(rank.worker, kv_vllm.SENDER)
        sender.side = replace(sender.side, **changes)
        sender.said["side"] = {**sender.said["side"], **changes}
