"""A decode rank that a test plays, on a socket of its own: it says what the test wants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

# The ranks and the engine of the unit tests.
sys.path.append(str(Path(__file__).parents[1] / "unit"))

from kv_engine import connector
from kv_ranks import BLOCKS, D_BLOCKS, World

from ascend_patch.impl import kv_handshake
from ascend_patch.impl.kv_vllm_wire import ASK, CANCEL, DONE, FAILED, Answer

__all__ = ["Peer", "Prefill", "connector"]


class Peer:
    """One connection to a prefill rank of a `World`.

    Attributes:
        last: The last answer that it heard.
    """

    def __init__(self, world: World, rank: int = 0) -> None:
        self.world = world
        self.socket = world.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(world.addresses[rank])
        self.last: Any = None
        self.sides: dict[str, str] = {}

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def message(self, kind: str, epoch: Any, transfer: Any, **changes: Any) -> dict[str, Any]:
        """What a decode rank of the world would say, with changes of fields and of its side."""
        rank = self.world.decode[0]
        said = kv_handshake.say(rank.side, "model")
        field = {"kind": kind, "epoch": epoch, "transfer": transfer, "rank": 0}
        found: dict[str, Any] = {
            "remote_port": 1,
            "remote_tp_size": rank.side.tp,
            "remote_tp_rank": 0,
            "req_blocks": {"d1": (transfer, D_BLOCKS)},
            "kv_caches_base_addr": rank.worker.kv_caches_base_addr,
        }
        if kind == ASK:
            side = said["side"] | changes.pop("side", {})
            field |= said | {
                "side": side,
                "puller": "decode-engine",
                "hostname": "127.0.0.1",
                "prefill_tp": len(self.world.prefill),
                "num_blocks": BLOCKS,
            }
            found["remote_tp_size"] = side["tp"] if 0 <= side["tp"] < 2**63 else 1
        elif kind == CANCEL:
            field["last"] = True
        for name in ("remote_port", "remote_tp_rank", "req_blocks", "kv_caches_base_addr"):
            if name in changes:
                found[name] = changes.pop(name)
        return found | {"ascend_patch": field | changes}

    async def say(self, kind: str, epoch: Any, *, transfer: Any, **changes: Any) -> None:
        """Send a message."""
        found = self.message(kind, epoch, transfer, **changes)
        await self.socket.send(msgspec.msgpack.encode(found))

    async def hear(self, epoch: str, seconds: float = 5) -> str | None:
        """The state that the next answer to this attempt says; None if there is none for so long.

        An answer without a state is None too; `last` is the answer.
        """
        while await self.socket.poll(int(seconds * 1000)):
            self.last = msgspec.msgpack.decode(await self.socket.recv(), type=Answer)
            field = self.last.ascend_patch
            if field is None:
                return None
            if field["epoch"] == epoch:
                return str(field["state"])
        return None


class Prefill:
    """A prefill rank that a test plays, in the place of the first one of a `World`.

    Attributes:
        heard: What decode ranks have said: (identity, field).
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.socket = world.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        world.addresses[0] = f"tcp://127.0.0.1:{self.port}"
        self.heard: list[tuple[bytes, dict[str, Any]]] = []
        self.said = kv_handshake.say(world.prefill[0].side, "model") | {
            "nonce": "n",
            "job": 1,
            # Here a process ends when its side channel does.
            "process_port": self.port,
        }

    def __enter__(self) -> Prefill:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    async def hear(self, kind: str, seconds: float = 10) -> None:
        """Wait for a message of this kind; others are noted on the way."""
        while await self.socket.poll(int(seconds * 1000)):
            identity, data = await self.socket.recv_multipart()
            self.heard.append((identity, msgspec.msgpack.decode(data)["ascend_patch"]))
            if self.heard[-1][1]["kind"] == kind:
                return
        raise AssertionError(f"nobody said {kind}; heard {[one['kind'] for _, one in self.heard]}")

    async def send(self, data: bytes) -> None:
        """Send these bytes to whom it heard last."""
        await self.socket.send_multipart((self.heard[-1][0], data))

    async def say(self, state: str, sentence: str | None = None, **changes: Any) -> None:
        """Answer what it heard last, with changes of the field."""
        epoch = self.heard[-1][1]["epoch"]
        field = self.said | {"epoch": epoch, "state": state, "again": False} | changes
        status = 0 if state in (DONE, FAILED) else 1
        found = {"status": status, "err_msg": sentence, "ascend_patch": field}
        await self.send(msgspec.msgpack.encode(found))

    async def allowed(self) -> None:
        """Accept the next question, and be allowed to write."""
        await self.hear(ASK)
        await self.say("accepted")
        await self.say("ready")
        await self.hear("go")
