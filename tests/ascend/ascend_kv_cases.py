"""What is done with MooncakeConnectorV1's ranks; import it after `ascend_kv`."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import ascend_kv_split as split
from ascend_kv import NEWER, NEWEST, OLDEST, ROLES, TOKENS, Pair, host, scheduler
from ascend_kv_engine import HOST, Engine, free_port
from ascend_kv_pulled import LINES, LOCAL, REMOTE, pulled


def ratios(seed: int) -> dict:
    """Prefill TP, decode TP, KV heads that the release moves."""
    cases = ((1, 1, 2), (2, 1, 4), (2, 2, 2), (4, 2, 2), (4, 2, 4), (4, 1, 2))
    return {
        f"{p} -> {d}, {heads} heads": pulled(Pair(p, d, heads, seed=seed), "one")
        for p, d, heads in cases
    }


def settings(seed: int) -> dict:
    """What a server with settings that make no sense does: it ends at its start, or pulls."""
    found = {}
    for name, value in (("pull_retries", "many"), ("pull_timeout_s", -1)):
        try:
            found[name] = pulled(Pair(1, 1, 2, seed=seed, **{name: value}), "one")
        except Exception as error:
            found[name] = {"raised": type(error).__name__, "says": str(error)}
    return found


def engine_fails(seed: int, times: int) -> dict:
    """The engine fails for one rank, and the next request is another."""
    pair = Pair(4, 2, 4, seed=seed)
    Engine.codes = [-1] * times
    first = pulled(pair, "one")
    Engine.codes = []
    return {"one": first, "next": pulled(pair, "two")}


def wrong_topology(seed: int, prefill: int, decode: int) -> dict:
    return pulled(Pair(prefill, decode, 8, seed=seed), "one")


def prefill_is_larger(seed: int) -> dict:
    """Prefill has TP 4; what decode's configuration says is 2."""
    return pulled(Pair(4, 2, 4, seed=seed, says=(2, 2)), "one")


def other_blocks(seed: int) -> dict:
    """Prefill has blocks of 4 tokens, decode of others."""
    return {tokens: pulled(Pair(2, 2, 2, seed=seed, tokens=tokens), "one") for tokens in (6, 8)}


def silent_peers(seed: int) -> dict:
    """Two prefill ranks that do not answer, one after the other; then a request to another one."""
    pair, found = Pair(1, 1, 2, seed=seed), {}
    worker = pair.decode[0]
    for request in ("one", "two"):
        worker.start_load_kv(pair.metadata(request, LOCAL, REMOTE, free_port(1)))
        found[request] = pair.heard(worker, request, 12.0)
    pair.offer("three")
    worker.start_load_kv(pair.metadata("three", LOCAL, REMOTE))
    found["three"] = pair.heard(worker, "three", 12.0)
    found["right"] = pair.right(LOCAL, REMOTE)
    return found


def often(seed: int) -> list:
    """Seconds for each of two requests of a prefill rank that does not answer."""
    pair, port, found = Pair(1, 1, 2, seed=seed), free_port(1), []
    worker = pair.decode[0]
    for number in range(2):
        began = time.monotonic()
        worker.start_load_kv(pair.metadata(f"often {number}", LOCAL, REMOTE, port))
        heard = pair.heard(worker, f"often {number}", 12.0)
        worker.kv_recv_thread.request_queue.join()
        # What a thread says to prefill when a request has ended.
        pair.offer("next")
        worker.start_load_kv(pair.metadata("next", LOCAL, REMOTE))
        pair.heard(worker, "next", 12.0)
        found.append((heard["done"], heard["invalid"], time.monotonic() - began))
    return found


def waited(seed: int) -> dict:
    """A request that has waited in decode's queue for a time, with prefill's blocks kept for it."""
    pair = Pair(1, 1, 2, seed=seed)
    first, second = (scheduler(pair, role) for role in ROLES)
    wrap = (lambda blocks: (blocks,)) if hasattr(host, "SupportsHMA") else (lambda b: b)
    asked = SimpleNamespace(
        request_id="one",
        status=host.RequestStatus.FINISHED_LENGTH_CAPPED,
        kv_transfer_params={"do_remote_decode": True},
        prompt_token_ids=[1] * 3 * TOKENS,
        output_token_ids=[1],
    )
    found: dict = {}
    for name, seconds in (("soon", 0.0), ("late", 470.0), ("later", 490.0)):
        asked.request_id = name
        _, given = first.request_finished(asked, wrap(REMOTE))
        given["remote_host"] = HOST
        told = {key: value for key, value in given.items() if key.startswith("ascend_patch")}
        blocks = SimpleNamespace(
            get_unhashed_block_ids=lambda: LOCAL,
            get_block_ids=lambda: wrap(LOCAL),
            get_unhashed_block_ids_all_groups=lambda: wrap(LOCAL),
        )
        request = SimpleNamespace(
            request_id=name, kv_transfer_params=given, arrival_time=time.time() - seconds
        )
        second.update_state_after_alloc(request, blocks, 3 * TOKENS)
        pair.offer(name)
        del LINES[:]
        pair.decode[0].start_load_kv(second.build_connector_meta(None))
        heard = pair.heard(pair.decode[0], name)
        found[name] = {
            "heard": [heard],
            "freed": pair.freed(name, 2.0),
            "lines": list(LINES),
            "told": told,
        }
    return found


def quick(seed: int) -> dict:
    """A request that ends before the release has noted it: nothing is to be read."""
    pair = Pair(1, 1, 2, seed=seed)
    thread, found = pair.decode[0].kv_recv_thread, []
    for number in range(4):
        given = pair.metadata(f"quick {number}", [], REMOTE)
        # As if the worker's thread were not scheduled for a while.
        given.reqs_in_batch = _Slow(given.reqs_in_batch, thread.request_queue)
        pair.offer(f"quick {number}")
        pair.decode[0].start_load_kv(given)
        found.append(pair.heard(pair.decode[0], f"quick {number}", 0.5)["done"])
    return {"done": found}


class _Slow(set):
    def __init__(self, items: Any, queue: Any) -> None:
        super().__init__(items)
        self._queue = queue

    def __iter__(self) -> Any:
        deadline = time.monotonic() + 0.5
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)
        return super().__iter__()


def runner() -> dict:
    """What the model runner makes of blocks that were not loaded."""
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.v1.outputs import KVConnectorOutput
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    connector = SimpleNamespace(get_block_ids_with_load_errors=lambda: {4, 9})
    kept = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    try:
        runner = NPUModelRunner.__new__(NPUModelRunner)
        runner.execute_model_state = None
        runner.kv_connector_output = KVConnectorOutput(finished_recving={"one"})
        found = runner.sample_tokens(None).kv_connector_output
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = kept
    return {"done": sorted(found.finished_recving), "invalid": sorted(found.invalid_block_ids)}


def choices() -> dict:
    """Of all powers of two up to 16: how many of the release's own choices are refused."""
    from ascend_patch.impl import kv_ascend_checks as checks
    from ascend_patch.kernels.kv_layout import LayerGroup, Side

    refused, asked = [], 0
    sizes = (1, 2, 4, 8, 16)
    for prefill, decode, heads, latent in itertools.product(sizes, sizes, sizes, (False, True)):
        if prefill < decode or (latent and heads > 1):
            continue
        worker = host.MooncakeConnectorWorker.__new__(host.MooncakeConnectorWorker)
        worker._prefill_tp_size, worker._decode_tp_size = prefill, decode
        worker._prefill_pp_size, worker.num_key_value_heads = 1, 128 if latent else heads
        worker.use_sparse = worker._has_mamba = False
        model = SimpleNamespace(is_deepseek_mla=latent)
        worker.vllm_config = SimpleNamespace(model_config=model)
        held = [max(1, heads // tp) for tp in (decode, prefill)]
        worker.tp_num_need_pulls = pulls = 1 if latent else held[0] // held[1]
        side = Side((LayerGroup(2, 1 if latent else heads, (8, 8)),), decode)
        given = checks.peer_side(side, tp=prefill, pp=1, partition=None)
        for request in range(20):
            chosen = worker._get_remote_ranks_for_req(f"request {request}")
            for rank in range(decode):
                asked += 1
                reason = checks.wrong_ranks(given, side, chosen, rank, pulls)
                if reason is not None:
                    refused.append(reason)
    return {"asked": asked, "refused": refused[:5]}


def everything(seed: int, patched: bool) -> dict[str, Any]:
    """All cases, by name."""
    if OLDEST:
        return everything_oldest(seed, patched)
    if NEWEST:
        return everything_newest(seed)
    return {
        "ratios": ratios(seed),
        "engine fails once": engine_fails(seed, 1),
        "engine fails": engine_fails(seed, 40),
        "8 -> 3": wrong_topology(seed, 8, 3),
        "6 -> 4": wrong_topology(seed, 6, 4),
        "prefill is larger": None if NEWER else prefill_is_larger(seed),
        "other blocks": other_blocks(seed),
        "silent peers": silent_peers(seed),
        "often": often(seed) if patched else None,
        "waited": waited(seed),
        "quick": quick(seed),
        "settings": settings(seed),
        "starts": split.starts(seed) if not patched else None,
        "splits": split.splits(seed) if patched else None,
        "split readers": split.split_readers(seed) if patched else None,
        "split fails": split.split_fails(seed) if patched else None,
        "split refused": split.split_refused(seed) if patched else None,
        "runner": None if NEWER else runner(),
        "choices": choices() if patched else None,
    }


def everything_oldest(seed: int, patched: bool) -> dict[str, Any]:
    """All cases that 0.11 has, by name."""
    return {
        "ratios": ratios(seed),
        "engine fails once": engine_fails(seed, 1),
        "engine fails": engine_fails(seed, 40),
        "8 -> 3": wrong_topology(seed, 8, 3),
        "6 -> 4": wrong_topology(seed, 6, 4),
        "silent peers": silent_peers(seed),
        "waited": waited(seed),
        "settings": settings(seed),
        "starts": split.starts(seed),
    }


def everything_newest(seed: int) -> dict[str, Any]:
    """All cases that 0.23 has, by name."""
    return {
        "ratios": ratios(seed),
        "engine fails": engine_fails(seed, 40),
        "8 -> 3": wrong_topology(seed, 8, 3),
        "6 -> 4": wrong_topology(seed, 6, 4),
        "other blocks": pulled(Pair(2, 2, 2, seed=seed, tokens=6), "one"),
        "silent peers": silent_peers(seed),
        "waited": waited(seed),
        "starts": split.starts(seed),
    }


def reverted(seed: int) -> dict:
    """A pull that fails, when the patch is gone."""
    import ascend_patch

    ascend_patch.revert("kv_connector")
    Engine.codes = [-1]
    return pulled(Pair(1, 1, 2, seed=seed), "one")
