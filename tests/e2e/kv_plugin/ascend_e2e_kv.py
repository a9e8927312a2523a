"""Breaks KV transfers on demand, in running servers: what comparisons must notice, or survive.

A vLLM plugin (this folder goes on PYTHONPATH), so it reaches every worker and the shim knows
nothing of it. E2E_KV_FOLDER names a folder; its file `fault` names a fault, which may change at any
time; anything else changes nothing.

swap: two KV heads of each pulled block change places, once everything has arrived.
messages: of each three control messages one is lost and one comes twice.
refuse: each third push fails, as Mooncake's engine does where it loses its connection.
hold: a push stops half-way, for as long as this is the fault; `writing-RANK` appears meanwhile.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

SWAP, MESSAGES, REFUSE, HOLD = "swap", "messages", "refuse", "hold"


def install() -> None:
    if "E2E_KV_FOLDER" not in os.environ or not os.environ.get("ASCEND_PATCHES"):
        return
    from ascend_patch.impl.kv_vllm_link import Link
    from ascend_patch.impl.kv_vllm_receive import Receiver
    from ascend_patch.impl.kv_vllm_send import Sender

    folder = Path(os.environ["E2E_KV_FOLDER"])
    Receiver.finish = swapping(Receiver.finish, folder)
    Link.send = losing(Link.send, folder)
    Sender._repeat = losing(Sender._repeat, folder)
    Sender.__init__ = holding(Sender.__init__, folder)


def swapping(finish: Any, folder: Path) -> Any:
    def swap(receiver: Any, pull: Any) -> None:
        if read(folder) == SWAP and pull.blocks:
            for view in receiver.views:
                blocks = view[pull.blocks].clone()
                view[pull.blocks] = blocks.roll(1, dims=2)
            (folder / "swapped").touch()
        finish(receiver, pull)

    return swap


def losing(send: Any, folder: Path) -> Any:
    count = 0

    async def lose(self: Any, *args: Any) -> None:
        nonlocal count
        times = 1
        if read(folder) == MESSAGES:
            count += 1
            times = (0, 2, 1)[count % 3]
        for _ in range(times):
            await send(self, *args)

    return lose


def holding(init: Any, folder: Path) -> Any:
    def hold(sender: Any, worker: Any, *args: Any, **more: Any) -> None:
        init(sender, worker, *args, **more)
        push, count = worker._send_blocks, 0

        def push_halves(session: str, local: list, remote: list, lengths: list) -> int:
            nonlocal count
            count += 1
            if read(folder) == REFUSE and count % 3 == 0:
                return -1
            if read(folder) != HOLD:
                return push(session, local, remote, lengths)
            half = len(local) // 2
            code = push(session, local[:half], remote[:half], lengths[:half]) if half else 0
            (folder / f"writing-{worker.tp_rank}").touch()
            while read(folder) == HOLD:
                time.sleep(0.1)
            return code or push(session, local[half:], remote[half:], lengths[half:])

        worker._send_blocks = push_halves

    return hold


def read(folder: Path) -> str:
    try:
        return (folder / "fault").read_text()
    except OSError:
        return ""
