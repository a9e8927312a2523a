"""Prefill and decode ranks of MooncakeConnectorV1 in one process, of the release that runs.

Real are the release's modules: workers, receiving and sending threads, task trackers, messages
over ZMQ on the loopback interface. Stubbed are the operators of the relayout, what a rank asks of
torch.distributed, and the transfer engine, which copies between tensors of this process; with
ASCEND_KV_ENGINE=tcp it is Mooncake's over TCP, and each rank needs a process of its own.

Import it in an environment's process, after a platform.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from types import SimpleNamespace
from typing import Any

import torch
from ascend_kv_engine import HOST, free_port
from ascend_kv_heard import newest, oldest

LAYERS, BLOCKS, TOKENS, WIDTH = 3, 12, 4, 8
POISON = -7.0
ROLES = ("kv_producer", "kv_consumer")


NAMES = (
    "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector",
    "vllm_ascend.distributed.mooncake_connector",
)


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


NAME = next(name for name in NAMES if _found(name))
NEWER = NAME.endswith("kv_p2p.mooncake_connector")
host = importlib.import_module(NAME)
# 0.11: prefill does not note its requests, and vLLM has no blocks that were not loaded.
OLDEST = not hasattr(host.KVCacheTaskTracker, "add_req_to_process")
# 0.23: it reports those itself.
NEWEST = hasattr(host.KVCacheRecvingThread, "get_and_clear_invalid_block_ids")


def paged_cache_load(k_cache, v_cache, table, _, *, seq_starts, key, value) -> None:
    assert seq_starts.tolist() == [0]
    for cache, out in ((k_cache, key), (v_cache, value)):
        out.copy_(cache[table[0].long()].reshape(out.shape))


def reshape_and_cache(*, key, value, key_cache, value_cache, slot_indices) -> None:
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slot_indices.long()] = new


host.torch_npu = SimpleNamespace(
    atb=SimpleNamespace(npu_paged_cache_load=paged_cache_load),
    _npu_reshape_and_cache=reshape_and_cache,
)
torch.npu.synchronize = lambda: None
torch.npu.set_device = lambda _: None
# While a thread starts, a worker sleeps three seconds.
host.time = SimpleNamespace(
    time=time.time,
    perf_counter=time.perf_counter,
    sleep=lambda seconds: time.sleep(min(seconds, 0.05)),
)
host.get_ip = lambda: HOST
host.init_ascend_config = lambda _: None
host.is_vl_model = lambda _: False
host.enable_custom_op = lambda: False
host.get_ascend_config = lambda: SimpleNamespace(enable_kv_nz=False)
for size in ("get_pcp_group", "get_pp_group", "get_tp_group"):
    setattr(host, size, lambda: SimpleNamespace(world_size=1, rank_in_group=0))
host.get_decode_context_model_parallel_world_size = lambda: 1
host.get_decode_context_model_parallel_rank = lambda: 0


class Pair:
    """Prefill TP ranks and decode TP ranks of one model, with random KV in all prefill blocks.

    Args:
        says: The sizes that the configuration of decode names, where they are others.
        told: The sizes that the configuration of prefill names.
        ports: The first one of prefill's ranks and of decode's, where they are elsewhere too.
        only: The role and rank that are here; None: all are.
    """

    def __init__(
        self,
        prefill: int,
        decode: int,
        heads: int,
        *,
        seed: int,
        says=None,
        told=None,
        tokens=TOKENS,
        blocks=BLOCKS,
        ports=None,
        only=None,
        **extra,
    ) -> None:
        self.sizes, self.heads, self.extra = (prefill, decode), heads, extra
        self.says, self.told = says or self.sizes, told or self.sizes
        random = torch.Generator().manual_seed(seed)
        shape = (2, LAYERS, blocks, TOKENS, heads, WIDTH)
        self.model = torch.randn(shape, generator=random)
        self.port, other = ports or (free_port(prefill), 0)
        here = {role: range(size) for role, size in zip(ROLES, self.sizes, strict=True)}
        if only is not None:
            here = {role: [only[1]] if role == only[0] else [] for role in ROLES}
        first, second = (here[role] for role in ROLES)
        self.ranks = second
        self.prefill = [self._worker(r, prefill, ROLES[0], TOKENS) for r in first]
        other = other or free_port(decode)
        self.decode = [self._worker(r, decode, ROLES[1], tokens, other) for r in second]

    def config(self, tp: int, role: str, tokens: int, port: int = 0) -> Any:
        """What vLLM's configuration of a server is to the release."""
        producer = role == "kv_producer"
        given = dict(zip(("prefill", "decode"), self.told if producer else self.says, strict=True))
        extra = {name: {"tp_size": size, "dp_size": 1} for name, size in given.items()}
        extra.update(self.extra)
        transfer = SimpleNamespace(
            kv_port=self.port if producer else port,
            kv_role=role,
            kv_connector_extra_config=extra,
            get_from_extra_config=lambda name, default: extra.get(name, default),
            engine_id=role,
        )
        text = SimpleNamespace(
            num_key_value_heads=self.heads,
            num_hidden_layers=LAYERS,
            head_dim=WIDTH,
            model_type="tiny",
        )
        return SimpleNamespace(
            kv_transfer_config=transfer,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=tp,
                pipeline_parallel_size=1,
                data_parallel_rank=0,
                data_parallel_size=1,
                data_parallel_rank_local=0,
                data_parallel_size_local=1,
                prefill_context_parallel_size=1,
                decode_context_parallel_size=1,
            ),
            cache_config=SimpleNamespace(block_size=tokens),
            model_config=SimpleNamespace(
                hf_text_config=text,
                hf_config=text,
                is_deepseek_mla=False,
                model="tiny",
                get_total_num_hidden_layers=lambda: LAYERS,
                get_total_num_kv_heads=lambda: self.heads,
            ),
            speculative_config=None,
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
        )

    def _worker(self, rank: int, tp: int, role: str, tokens: int, port: int = 0) -> Any:
        config, producer = self.config(tp, role, tokens, port), role == "kv_producer"
        host.get_tensor_model_parallel_rank = lambda: rank
        host.get_tensor_model_parallel_world_size = lambda: tp
        each = (*self._heads(rank, tp),)
        caches = {}
        for layer in range(LAYERS):
            pair = []
            for part in range(2):
                cut = self.model[part, layer, :, :, each[0] : each[1]].contiguous()
                if not producer:
                    cut = torch.full_like(cut, POISON).view(-1, tokens, *cut.shape[2:])
                pair.append(cut)
            caches[f"layers.{layer}"] = tuple(pair)
        more = () if not hasattr(host, "SupportsHMA") else (_groups(caches, tokens),)
        worker = host.MooncakeConnectorWorker(config, f"{role}-{self.port}", *more)
        worker.register_kv_caches(caches)
        return worker

    def _heads(self, rank: int, tp: int) -> tuple[int, int]:
        if tp >= self.heads:
            first = rank // max(1, tp // self.heads) % self.heads
            return first, first + 1
        count = self.heads // tp
        return rank * count, (rank + 1) * count

    def metadata(self, request: str, local: list[int], remote: list[int], port: int = 0) -> Any:
        """What the scheduler of decode tells its workers of a new request."""
        found = host.MooncakeConnectorMetadata()
        wrap = (lambda blocks: (blocks,)) if hasattr(host, "SupportsHMA") else (lambda b: b)
        tokens = {} if OLDEST else {"num_external_tokens": len(local) * TOKENS}
        found.add_new_req(
            request_id=request,
            local_block_ids=wrap(local),
            **tokens,
            kv_transfer_params={
                "remote_block_ids": wrap(remote),
                "remote_engine_id": f"kv_producer-{self.port}" if not port else "another",
                "remote_host": HOST,
                "remote_port": port or self.port,
                "remote_request_id": request,
                "remote_ptp_size": self.sizes[0],
                "num_prompt_blocks": len(remote),
            },
        )
        found.reqs_in_batch = {request}
        return found

    def offer(self, request: str) -> None:
        """Prefill has computed a request, and keeps its blocks."""
        for worker in self.prefill:
            found = host.MooncakeConnectorMetadata()
            found.reqs_in_batch = {request}
            found.requests_to_send[request] = time.time()
            worker.start_load_kv(found)

    def pull(self, request: str, local: list[int], remote: list[int], **given: Any) -> list[dict]:
        """Each decode rank's report: what its engine steps heard, in order."""
        for worker in self.decode:
            worker.start_load_kv(self.metadata(request, local, remote, **given))
        return [self.heard(worker, request) for worker in self.decode]

    def heard(
        self, worker: Any, request: str, seconds: float = 20.0, *, reported: bool = False
    ) -> dict:
        """Step until the request has finished: what was said to be invalid, and when.

        Args:
            reported: Or until something was said to be invalid.
        """
        connector = host.MooncakeConnector.__new__(host.MooncakeConnector)
        connector.connector_worker, connector.connector_scheduler = worker, None
        early: set[int] = set()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, invalid = oldest(connector) if OLDEST else newest(connector)
            if request in (done or ()):
                return {"done": True, "invalid": sorted(invalid), "early": sorted(early)}
            early |= invalid
            if reported and early:
                break
            time.sleep(0.02)
        return {"done": False, "invalid": [], "early": sorted(early)}

    def freed(self, request: str, seconds: float = 5.0) -> list[int]:
        """How often each prefill rank said that the request's blocks may be freed."""
        counts = [0] * len(self.prefill)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for n, worker in enumerate(self.prefill):
                counts[n] += request in worker.get_finished()[0]
            if min(counts) >= 1:
                deadline = min(deadline, time.monotonic() + 0.3)
            time.sleep(0.02)
        return counts

    def right(self, local: list[int], remote: list[int]) -> list[bool]:
        """Of each decode rank: whether its blocks hold what its own prefill would have left.

        And no other block was touched.
        """
        found = []
        for rank, worker in zip(self.ranks, self.decode, strict=True):
            first, end = self._heads(rank, self.sizes[1])
            found.append(
                all(
                    torch.equal(cache[local], self.model[part, layer][remote][:, :, first:end])
                    and all((cache[n] == POISON).all() for n in range(len(cache)) if n not in local)
                    for layer, pair in enumerate(worker.kv_caches.values())
                    for part, cache in enumerate(pair)
                )
            )
        return found


def scheduler(pair: Pair, role: str) -> Any:
    """The scheduler's side of a server of a pair."""
    more = ()
    if hasattr(host, "SupportsHMA"):
        caches = {"layers.0": (torch.zeros(BLOCKS, TOKENS, 1, WIDTH),)}
        more = (_groups(caches, TOKENS),)
    config = pair.config(pair.sizes[ROLES.index(role)], role, TOKENS)
    return host.MooncakeConnectorScheduler(config, f"{role}-{pair.port}", *more)


def _groups(caches: dict, tokens: int) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    heads = next(iter(caches.values()))[0].shape[2]
    spec = FullAttentionSpec(
        block_size=tokens, num_kv_heads=heads, head_size=WIDTH, dtype=torch.float32
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=list(caches))
    blocks = next(iter(caches.values()))[0].shape[0]
    return SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group], kv_cache_tensors=[])
