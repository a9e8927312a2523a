"""A stand-in for MooncakeConnectorV1 where vllm-ascend is not installed, with the patch's targets.

It has the names, messages, threads and decisions of vllm-ascend 0.18.0 that the patch touches, at
equal tensor-parallel sizes, written anew and much shorter: what is shown on it is shown of the
shim's own code. The same cases run on the real classes of four releases in tests/ascend (slow).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import queue
import sys
import threading
import time
import types
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import zmq
from vllm import envs

NAME = "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector"
GET_META_MSG, DONE_RECVING_MSG = b"get_meta_msg", b"done_recving_msg"
RequestStatus = SimpleNamespace(FINISHED_LENGTH_CAPPED="capped")
# What `ascend_kv` puts in place, as it does with the release's.
get_tensor_model_parallel_rank = get_tensor_model_parallel_world_size = lambda: 0
get_ascend_config: Any = None
get_ip: Any = None


class MooncakeAgentMetadata(msgspec.Struct, omit_defaults=True, dict=True):
    engine_id: str
    te_rpc_port: int
    kv_caches_base_addr: list[int]
    num_blocks: int
    local_ip: str = ""


@dataclass
class ReqMeta:
    local_block_ids: list[int]
    num_external_tokens: int
    remote_block_ids: list[int]
    remote_host: str
    remote_port: int
    remote_engine_id: str
    remote_request_id: str
    remote_pcp_size: int
    remote_dcp_size: int
    remote_ptp_size: int | None
    remote_multi_nodes_meta_mapping: dict[str, Any]
    num_prompt_blocks: int


class SizedDict(OrderedDict):
    """Forgets its oldest entry beyond 16000, and makes those that are looked up."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > 16000:
            self.popitem(last=False)

    def __getitem__(self, key: Any) -> Any:
        if key not in self:
            self[key] = {}
        return super().__getitem__(key)


class KVCacheTaskTracker:
    def __init__(self) -> None:
        self.done_task_lock = threading.Lock()
        self.finished_requests: set[str] = set()
        self.delayed_free_requests: OrderedDict[str, float] = OrderedDict()
        self.reqs_to_process: set[str] = set()

    def add_req_to_process(self, request_id: str) -> None:
        self.reqs_to_process.add(request_id)

    def add_not_transfer_request(self, request_id: str) -> None:
        self.finished_requests.add(request_id)
        self.reqs_to_process.discard(request_id)

    def update_done_task_count(self, request_id: str) -> None:
        with self.done_task_lock:
            if request_id in self.reqs_to_process:
                self.finished_requests.add(request_id)
                self.reqs_to_process.discard(request_id)
                self.delayed_free_requests.pop(request_id, None)

    def add_delayed_request(self, request_id: str, delay_start_time: float) -> None:
        with self.done_task_lock:
            if request_id in self.reqs_to_process:
                self.delayed_free_requests[request_id] = delay_start_time

    def get_and_clear_finished_requests(self) -> set[str]:
        with self.done_task_lock:
            found, self.finished_requests = self.finished_requests, set()
            keeps = envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT
            for name, began in list(self.delayed_free_requests.items()):
                if time.time() - began > keeps:
                    del self.delayed_free_requests[name]
                    self.reqs_to_process.discard(name)
                    found.add(name)
        return found


def make_zmq_path(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _socket(context: Any, path: str, kind: int, bind: bool) -> Any:
    found = context.socket(kind)
    if kind == zmq.ROUTER:
        found.setsockopt(zmq.RCVHWM, 0)
        found.setsockopt(zmq.SNDHWM, 0)
    found.setsockopt(zmq.IPV6, int("[" in path))
    (found.bind if bind else found.connect)(path)
    return found


@contextlib.contextmanager
def zmq_ctx(socket_type: Any, addr: str) -> Any:
    context = zmq.Context()
    try:
        yield _socket(context, addr, socket_type, socket_type == zmq.ROUTER)
    finally:
        context.destroy(linger=0)


def ensure_zmq_send(socket: Any, data: bytes, path: str) -> None:
    try:
        socket.send(data)
    except zmq.ZMQError as error:
        raise RuntimeError(f"nothing was sent to {path}: {error}") from None


def ensure_zmq_recv(socket: Any, poller: Any, path: str, timeout: float = 1.0) -> bytes:
    for _ in range(3):
        if dict(poller.poll(int(timeout * 1000))):
            return socket.recv()
    raise RuntimeError(f"nothing came from {path}")


def string_to_int64_hash(text: str) -> int:
    return sum(text.encode())


class KVCacheSendingThread(threading.Thread):
    def __init__(self, vllm_config: Any, worker: Any, metadata: Any, ready_event: Any) -> None:
        super().__init__(daemon=True)
        self.metadata, self.ready_event = metadata, ready_event
        self.kv_caches = worker.kv_caches
        self.side_channel_host, self.side_channel_port = get_ip(), worker.side_channel_port
        self.handshake_port = worker.handshake_port
        self.port_send_num: dict[str, int] = {}
        self.task_tracker = KVCacheTaskTracker()

    def get_and_clear_finished_requests(self) -> set[str]:
        return self.task_tracker.get_and_clear_finished_requests()

    def run(self) -> None:
        path = make_zmq_path("tcp", self.side_channel_host, self.handshake_port)
        with zmq_ctx(zmq.ROUTER, path) as socket:
            self.ready_event.set()
            self.run_busy_loop(socket)

    def run_busy_loop(self, socket: Any) -> None:
        metadata = msgspec.msgpack.encode(self.metadata)
        decoder = msgspec.msgpack.Decoder(type=tuple)
        while True:
            try:
                frames = socket.recv_multipart()
                (payload,) = [frame for frame in frames[1:] if frame]
                message = decoder.decode(payload)
                if message[0] == GET_META_MSG:
                    socket.send_multipart((frames[0], b"", metadata))
                elif message[0] == DONE_RECVING_MSG:
                    self._done(message[1], message[2])
                    socket.send_multipart((frames[0], b"", b"ACK"))
            except zmq.ContextTerminated:
                return
            except Exception:
                continue

    def _done(self, request: str, counts: Any) -> None:
        if counts:
            self.port_send_num[request] = self.port_send_num.get(request, 0) + 1
            if self.port_send_num[request] < counts[self.handshake_port]["num"]:
                return
            del self.port_send_num[request]
        self.task_tracker.update_done_task_count(request)


class KVCacheRecvingThread(threading.Thread):
    def __init__(self, worker: Any, bases: list[int], ready_event: Any) -> None:
        super().__init__(daemon=True)
        self.tp_rank, self.tp_size, self.engine = worker.tp_rank, worker.tp_size, worker.engine
        self.vllm_config, self.kv_caches = worker.vllm_config, worker.kv_caches
        self.local_engine_id, self.ready_event = worker.engine_id, ready_event
        self.local_handshake_port = worker.handshake_port
        self.side_channel_port = worker.side_channel_port
        self.kv_caches_base_addr, self.remote_te_port = SizedDict(), SizedDict()
        self.kv_caches_base_addr[self.local_engine_id][self.local_handshake_port] = bases
        self.block_len = worker.block_len
        self.pp_layer_indices = {0: (0, len(self.kv_caches))}
        self.request_queue: queue.Queue[Any] = queue.Queue()
        self.task_tracker = KVCacheTaskTracker()
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder: Any = msgspec.msgpack.Decoder(MooncakeAgentMetadata)
        self.remote_sockets_lock = threading.Lock()
        self.remote_sockets: dict[str, deque[Any]] = defaultdict(deque)
        self.remote_poller, self.timeout = zmq.Poller(), 1.0

    def add_request(self, **given: Any) -> None:
        given.setdefault("remote_port_send_num", {})
        given.setdefault("all_task_done", False)
        self.request_queue.put(given)

    def get_and_clear_finished_requests(self) -> set[str]:
        return self.task_tracker.get_and_clear_finished_requests()

    def run(self) -> None:
        self.ready_event.set()
        while True:
            with contextlib.suppress(Exception):
                self._handle_request(self.request_queue.get())

    def _handle_request(self, req_meta: dict[str, Any]) -> None:
        try:
            with contextlib.suppress(Exception):
                self._transfer_kv_cache(req_meta)
        finally:
            if req_meta["all_task_done"]:
                self.task_tracker.update_done_task_count(req_meta["request_id"])
            self.request_queue.task_done()
            self._send_done_recv_signal(
                req_meta["remote_request_id"],
                req_meta["remote_host"],
                req_meta["remote_handshake_port"],
                req_meta["remote_port_send_num"],
            )

    def _send_done_signal_to_free_remote_port(self, *_: Any) -> None: ...

    def _transfer_kv_cache(self, req_meta: dict[str, Any]) -> None:
        local, remote = req_meta["local_block_ids"], req_meta["remote_block_ids"]
        if not local:
            return
        assert len(local) <= len(remote)
        remote = remote[-len(local) :]
        engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
        if port not in self.kv_caches_base_addr.get(engine, {}):
            self._get_remote_metadata(req_meta["remote_host"], port)
        own = self.kv_caches_base_addr[self.local_engine_id][self.local_handshake_port]
        theirs = self.kv_caches_base_addr[engine][port]
        size = self.block_len[0]
        ranges = [
            (here + ours * size, there + other * size, size)
            for here, there in zip(own, theirs, strict=False)
            for ours, other in zip(local, remote, strict=True)
        ]
        session = f"{req_meta['remote_host']}:{self.remote_te_port[engine][port]}"
        code = self.engine.batch_transfer_sync_read(session, *map(list, zip(*ranges, strict=True)))
        if code < 0:
            raise RuntimeError(f"Mooncake transfer failed, ret: {code}")

    def _get_remote_metadata(self, remote_host: str, remote_handshake_port: int) -> None:
        socket = self._get_remote_socket(remote_host, remote_handshake_port)
        path = f"{remote_host}:{remote_handshake_port}"
        try:
            ensure_zmq_send(socket, self.encoder.encode((GET_META_MSG, "")), path)
            found = self.decoder.decode(ensure_zmq_recv(socket, self.remote_poller, path))
            known = self.kv_caches_base_addr, self.remote_te_port
            for book, value in zip(
                known, (found.kv_caches_base_addr, found.te_rpc_port), strict=True
            ):
                book[found.engine_id][remote_handshake_port] = value
        finally:
            self._return_remote_socket(socket, remote_host, remote_handshake_port)

    def _send_done_recv_signal(
        self, request_id: str, remote_host: str, remote_handshake_port: int, counts: Any
    ) -> None:
        socket = self._get_remote_socket(remote_host, remote_handshake_port)
        path = f"{remote_host}:{remote_handshake_port}"
        try:
            ensure_zmq_send(
                socket, self.encoder.encode((DONE_RECVING_MSG, request_id, counts)), path
            )
            ensure_zmq_recv(socket, self.remote_poller, path)
        except RuntimeError:
            socket.close()
            return
        self._return_remote_socket(socket, remote_host, remote_handshake_port)

    def _get_remote_socket(self, remote_host: str, remote_handshake_port: int) -> Any:
        path = make_zmq_path("tcp", remote_host, remote_handshake_port)
        with self.remote_sockets_lock:
            if self.remote_sockets[path]:
                return self.remote_sockets[path].popleft()
        found = _socket(zmq.Context(), path, zmq.REQ, bind=False)
        found.setsockopt(zmq.SNDTIMEO, 1000)
        self.remote_poller.register(found, zmq.POLLIN)
        return found

    def _return_remote_socket(
        self, sock: Any, remote_host: str, remote_handshake_port: int
    ) -> None:
        path = make_zmq_path("tcp", remote_host, remote_handshake_port)
        with self.remote_sockets_lock:
            self.remote_sockets[path].append(sock)


class MooncakeConnectorMetadata:
    def __init__(self) -> None:
        self.requests: dict[str, ReqMeta] = {}
        self.requests_to_send: dict[str, float] = {}
        self.reqs_in_batch: set[str] = set()

    def add_new_req(
        self,
        request_id: str,
        local_block_ids: Any,
        num_external_tokens: int,
        kv_transfer_params: Any,
    ) -> None:
        defaults = {
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_ptp_size": None,
            "remote_multi_nodes_meta_mapping": {},
            "num_prompt_blocks": 0,
        }
        named = {
            name: kv_transfer_params.get(name, defaults[name])
            if name in defaults
            else kv_transfer_params[name]
            for name in ReqMeta.__annotations__
            if name not in ("local_block_ids", "num_external_tokens")
        }
        self.requests[request_id] = ReqMeta(local_block_ids, num_external_tokens, **named)


class MooncakeConnector:
    connector_worker: Any
    connector_scheduler: Any

    def get_finished(self, _: Any) -> tuple[set[str], set[str]]:
        return self.connector_worker.get_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()


class MooncakeConnectorScheduler:
    def __init__(self, vllm_config: Any, engine_id: str) -> None:
        self.vllm_config, self.engine_id = vllm_config, engine_id
        self.block_size = vllm_config.cache_config.block_size
        self.side_channel_port = vllm_config.kv_transfer_config.kv_port
        self._reqs_need_recv: dict[str, tuple[Any, list[int], int]] = {}
        self._reqs_need_send: dict[str, float] = {}
        self._reqs_in_batch: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        params = request.kv_transfer_params
        if params is not None and params.get("do_remote_prefill"):
            count = max(len(request.prompt_token_ids) - num_computed_tokens, 0)
            return count, count > 0
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if params and (params.get("do_remote_prefill") or params.get("do_remote_decode")):
            self._reqs_in_batch.add(request.request_id)
        if params is not None and params.get("do_remote_prefill"):
            if params.get("remote_block_ids"):
                if all(
                    name in params
                    for name in (
                        "remote_engine_id",
                        "remote_host",
                        "remote_port",
                        "remote_request_id",
                    )
                ):
                    local = blocks.get_unhashed_block_ids() if num_external_tokens > 0 else []
                    self._reqs_need_recv[request.request_id] = request, local, num_external_tokens
            else:
                assert num_external_tokens == 0
            params["do_remote_prefill"] = False

    def build_connector_meta(self, _: Any) -> MooncakeConnectorMetadata:
        found = MooncakeConnectorMetadata()
        for name, (request, blocks, tokens) in self._reqs_need_recv.items():
            found.add_new_req(name, blocks, tokens, request.kv_transfer_params)
        self._reqs_need_recv.clear()
        found.requests_to_send, self._reqs_need_send = self._reqs_need_send, {}
        found.reqs_in_batch, self._reqs_in_batch = self._reqs_in_batch, set()
        return found

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        params = request.kv_transfer_params
        if (
            params is None
            or not params.get("do_remote_decode")
            or request.status != RequestStatus.FINISHED_LENGTH_CAPPED
        ):
            return False, None
        if block_ids:
            self._reqs_need_send[request.request_id] = time.time()
        return bool(block_ids), {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": block_ids,
            "remote_engine_id": self.engine_id,
            "remote_request_id": request.request_id,
            "remote_host": "127.0.0.1",
            "remote_port": self.side_channel_port,
            "remote_ptp_size": self.vllm_config.parallel_config.tensor_parallel_size,
        }


class MooncakeConnectorWorker:
    def __init__(self, vllm_config: Any, engine_id: str) -> None:
        self._get_prefill_decode_size(vllm_config)
        assert self._prefill_tp_size >= self._decode_tp_size
        self.vllm_config, self.engine_id = vllm_config, engine_id
        self.tp_rank = get_tensor_model_parallel_rank()
        self.tp_size = vllm_config.parallel_config.tensor_parallel_size
        self.pcp_size = self.dcp_size = self.tp_num_need_pulls = 1
        self.side_channel_port = vllm_config.kv_transfer_config.kv_port
        self.handshake_port = self.side_channel_port + self.tp_rank
        self.kv_role = vllm_config.kv_transfer_config.kv_role
        self.engine = sys.modules["mooncake.engine"].TransferEngine()
        self.kv_send_thread: Any = None
        self.kv_recv_thread: Any = None

    def _get_prefill_decode_size(self, vllm_config: Any) -> None:
        told = vllm_config.kv_transfer_config.get_from_extra_config
        self._prefill_tp_size = told("prefill", {})["tp_size"]
        self._decode_tp_size = told("decode", {})["tp_size"]
        self._prefill_pp_size, self._prefill_pp_layer_partition = 1, None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.kv_caches = kv_caches
        first = next(iter(kv_caches.values()))[0]
        self.block_len = [first[0].numel() * first.element_size()]
        bases = [cache.data_ptr() for layer in kv_caches.values() for cache in layer]
        metadata = MooncakeAgentMetadata(
            self.engine_id, self.engine.get_rpc_port(), bases, first.shape[0]
        )
        ready = threading.Event()
        if self.kv_role == "kv_producer":
            thread: Any = KVCacheSendingThread(self.vllm_config, self, metadata, ready)
            self.kv_send_thread = thread
        else:
            thread = self.kv_recv_thread = KVCacheRecvingThread(self, bases, ready)
        thread.start()
        if not ready.wait(5):
            raise RuntimeError("the thread did not start")

    def get_finished(self) -> tuple[set[str], set[str]]:
        if self.kv_role == "kv_producer":
            return self.kv_send_thread.get_and_clear_finished_requests(), set()
        return set(), self.kv_recv_thread.get_and_clear_finished_requests()

    def start_load_kv(self, metadata: MooncakeConnectorMetadata) -> None:
        for name, meta in metadata.requests.items():
            tp = meta.remote_ptp_size or self._prefill_tp_size
            pulls = self._get_tp_num_need_pulls(tp)
            assert meta.remote_pcp_size * meta.remote_dcp_size == 1
            ranks = self._get_remote_ranks_for_req(meta.remote_request_id, tp)[self.tp_rank]
            for number in range(pulls):
                host, engine = self._get_remote_host_info_by_port(
                    meta.remote_port,
                    meta.remote_port + ranks[number],
                    meta.remote_host,
                    meta.remote_engine_id,
                    meta.remote_multi_nodes_meta_mapping,
                )
                assert self.kv_recv_thread is not None
                self.kv_recv_thread.add_request(
                    request_id=name,
                    remote_request_id=meta.remote_request_id,
                    local_block_ids=meta.local_block_ids,
                    remote_block_ids=meta.remote_block_ids,
                    remote_engine_id=engine,
                    remote_host=host,
                    remote_handshake_port=meta.remote_port + ranks[number],
                    offset=number,
                    tp_num_need_pulls=pulls,
                    all_task_done=number == pulls - 1,
                )
        thread = self.kv_send_thread or self.kv_recv_thread
        for name in metadata.reqs_in_batch:
            thread.task_tracker.add_req_to_process(name)
        if self.kv_send_thread is not None:
            for name, began in metadata.requests_to_send.items():
                self.kv_send_thread.task_tracker.add_delayed_request(name, began)

    def _get_tp_num_need_pulls(self, prefill_tp_size: int) -> int:
        return prefill_tp_size // self._decode_tp_size

    def _get_remote_host_info_by_port(
        self, base: int, port: int, host: str, engine: str, nodes: Any
    ) -> tuple[str, str]:
        info = nodes.get(str(port - base)) if nodes is not None else None
        return (host, engine) if info is None else (info["host"], info["engine_id"])

    def _get_remote_ranks_for_req(
        self, req_id: str, prefill_tp_size: int | None = None
    ) -> list[list[int]]:
        # As the release does, which makes an array of all ranks.
        ranks = list(range(prefill_tp_size or self._prefill_tp_size))
        each = max(1, len(ranks) // self._decode_tp_size)
        return [ranks[n * each : (n + 1) * each] for n in range(self._decode_tp_size)]


class _Nothing(importlib.abc.Loader):
    def exec_module(self, module: Any) -> None: ...


def install() -> None:
    """Make it importable under the release's name, with the patch's targets of 0.18.0."""
    for end in range(1, NAME.count(".") + 1):
        name = ".".join(NAME.split(".")[:end])
        spec = importlib.machinery.ModuleSpec(name, _Nothing(), is_package=True)
        package = importlib.util.module_from_spec(spec)
        package.__version__ = "0.18.0"  # type: ignore[attr-defined]
        sys.modules[name] = package
    for missing in ("torch_npu",):
        sys.modules.setdefault(missing, types.ModuleType(missing))
    torch.npu = SimpleNamespace()  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


def apply() -> int:
    """Wrap what the patch replaces in 0.18.0; how many targets that were."""
    import wrapt

    from ascend_patch.patches import _kv_ascend

    module, count = sys.modules[NAME], 0
    band = next(band for band in _kv_ascend.BANDS if "0.18.0" in band.releases)
    for target in band.targets:
        where, _, path = target.symbol.partition(":")
        if where == NAME:
            replacement = target.replacement
            code, _, name = replacement.partition(":")
            wrapper = getattr(importlib.import_module(code), name)
            wrapt.wrap_function_wrapper(module, path, wrapper)
            count += 1
    errors = importlib.import_module("ascend_patch.impl.kv_ascend").load_errors
    wrapt.wrap_function_wrapper(module, "MooncakeConnector.get_block_ids_with_load_errors", errors)
    return count
