"""Random kv_transfer_params and messages to MooncakeConnectorV1; import it after `ascend_kv`."""

from __future__ import annotations

import copy
import random
import time
from types import SimpleNamespace
from typing import Any

import msgspec
from ascend_kv import ROLES, TOKENS, Pair, host, scheduler
from ascend_kv_engine import HOST

NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 65535, 65536, 10**6, 10**9, 2**31, 2**63, 2**64, 10**400)
FIELDS = (
    "remote_block_ids", "remote_engine_id", "remote_host", "remote_port", "remote_request_id",
    "remote_pcp_size", "remote_dcp_size", "remote_ptp_size", "num_prompt_blocks",
    "remote_multi_nodes_meta_mapping", "remote_block_size", "ascend_patch_keeps_s",
    "ascend_patch_attempt", "do_remote_prefill", "do_remote_decode", "last_token_id",
)  # fmt: skip


def junk(draw: random.Random, depth: int = 0) -> Any:
    """A value as JSON may have it."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice((float("nan"), float("inf"), -1.5, 1e308, 0.0))
    if kind == 2:
        return "".join(
            chr(draw.choice((0, 10, 47, 58, 97, 233, 0x5343))) for _ in range(draw.randrange(20))
        )
    if kind == 3:
        return draw.choice((None, True, False))
    if kind == 4:
        return draw.choice(("127.0.0.1", "::1", "[::1]", "*", "a;b", "host/../x", "x" * 5000))
    if kind == 5:
        return [draw.choice(NUMBERS) for _ in range(draw.randrange(6))]
    if kind == 6:
        return [junk(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(draw.choice(NUMBERS))[:9]: junk(draw, depth + 1) for _ in range(draw.randrange(4))}


def parameters(seed: int, count: int) -> dict[str, Any]:
    """Each through the scheduler and a worker, up to what is queued for the receiving thread."""
    print(f"parameters: seed {seed}")
    draw, pair = random.Random(seed), Pair(1, 1, 2, seed=seed)
    one, worker = scheduler(pair, ROLES[1]), pair.decode[0]
    queued: list[dict[str, Any]] = []
    thread = worker.kv_recv_thread
    thread.add_request = lambda **given: queued.append(given)
    wrap = (lambda blocks: (blocks,)) if hasattr(host, "SupportsHMA") else (lambda b: b)
    blocks = SimpleNamespace(
        get_unhashed_block_ids=lambda: [3, 1],
        get_block_ids=lambda: wrap([3, 1]),
        get_unhashed_block_ids_all_groups=lambda: wrap([3, 1]),
    )
    whole = {
        "do_remote_prefill": True, "do_remote_decode": False,
        "remote_block_ids": wrap([5, 6]), "remote_engine_id": f"kv_producer-{pair.port}",
        "remote_host": HOST, "remote_port": pair.port, "remote_request_id": "r",
        "remote_pcp_size": 1, "remote_dcp_size": 1, "remote_ptp_size": 1,
        "num_prompt_blocks": 2, "remote_multi_nodes_meta_mapping": {}, "remote_block_size": TOKENS,
    }  # fmt: skip
    raised, slowest, admitted, wrong = [], 0.0, 0, []
    for number in range(count):
        given: Any = copy.deepcopy(whole)
        for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
            name = draw.choice(FIELDS)
            if draw.random() < 0.1:
                given.pop(name, None)
            else:
                given[name] = junk(draw)
        if draw.random() < 0.01:
            given = junk(draw)
        kept = repr(given)[:300]
        request = SimpleNamespace(
            request_id=f"r{number}", kv_transfer_params=given, arrival_time=time.time(),
            prompt_token_ids=[1] * 2 * TOKENS,
        )  # fmt: skip
        began = time.process_time()
        try:
            tokens, _ = one.get_num_new_matched_tokens(request, 0)
            one.update_state_after_alloc(request, blocks, tokens)
            worker.start_load_kv(one.build_connector_meta(None))
            admitted += tokens > 0
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}"[:200] + " of " + kept)
            one._reqs_need_recv.clear()
        slowest = max(slowest, time.process_time() - began)
        for pull in queued:
            if (
                type(pull["remote_handshake_port"]) is not int
                or not 0 < pull["remote_handshake_port"] < 65536
            ):
                wrong.append(kept)
        del queued[:]
        if number % 512 == 0:
            # What a real engine step takes; it is not what is tried here.
            state = thread.__dict__.get("ascend_patch_failures")
            if state is not None:
                worker.get_finished()
                state.take_invalid()
    return {
        "tried": count, "raised": raised[:20], "count": len(raised), "slowest": slowest,
        "admitted": admitted, "wrong": wrong[:5],
    }  # fmt: skip


def wire(seed: int, count: int) -> dict[str, Any]:
    """Metadata of prefill ranks with random fields, to the decoder of a receiving thread."""
    print(f"wire: seed {seed}")
    draw, pair = random.Random(seed), Pair(1, 1, 2, seed=seed)
    thread, sender = pair.decode[0].kv_recv_thread, pair.prefill[0].kv_send_thread
    whole = msgspec.msgpack.decode(msgspec.msgpack.encode(sender.metadata))
    taken, refused, slowest, raised = 0, 0, 0.0, []
    for _ in range(count):
        given = copy.deepcopy(whole)
        side = (given.get("ascend_patch") or {}).get("side")
        for _ in range(draw.choice((0, 1, 1, 2))):
            if side is not None and draw.random() < 0.6:
                groups = side["groups"]
                first = groups[0] if isinstance(groups, list) and groups else None
                where = draw.choice((side, side, first if isinstance(first, dict) else side))
                if not where:
                    continue
                where[draw.choice(list(where))] = _plain(junk(draw))
            else:
                given[draw.choice(list(given))] = _plain(junk(draw))
        data = msgspec.msgpack.encode(given)
        if draw.random() < 0.1:
            data = data[: draw.randrange(len(data))] + draw.randbytes(draw.randrange(4))
        began = time.process_time()
        try:
            thread.decoder.decode(data)
            taken += 1
        except (ValueError, msgspec.MsgspecError):
            refused += 1
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}"[:300])
        slowest = max(slowest, time.process_time() - began)
    return {"tried": count, "taken": taken, "refused": refused, "slowest": slowest,
            "raised": raised[:10]}  # fmt: skip


def _plain(value: Any) -> Any:
    """A value that msgpack has: whole numbers of 64 bits."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return min(value, 2**64 - 1) if type(value) is int else value
