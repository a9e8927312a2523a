"""What a wrong or hostile peer makes of a message: bytes that cannot be read, and bytes that can.

Only changes that a receiver can tell from the truth: a whole forgery, with the epoch and the nonce
of the connection, is indistinguishable where the protocol has no authentication.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

FIELD = "ascend_patch"
Change = Callable[[list[bytes]], list[bytes]]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

GARBAGE = (
    b"",
    b"\x00",
    b"\xc1",
    b"\x80",
    b"\x93\x01",
    b"\xff" * 40,
    b"\xdf\xff\xff\xff\xff",
    b"{}",
)
HUGE = (2**63, 2**64 - 1, -1, -(2**63), 2**40, 0, True, False, 1.5, float("nan"), None, "x", [], {})


def raw(content: bytes) -> Change:
    """Other bytes altogether."""
    return lambda frames: [content]


def cut_short(frames: list[bytes]) -> list[bytes]:
    """Half of it."""
    return [frames[-1][: len(frames[-1]) // 2]]


def flip(place: int) -> Change:
    """One bit is another one."""

    def change(frames: list[bytes]) -> list[bytes]:
        found = bytearray(frames[-1])
        if found:
            found[place // 8 % len(found)] ^= 1 << place % 8
        return [bytes(found)]

    return change


def more_frames(frames: list[bytes]) -> list[bytes]:
    """A message of several frames, as a REQ socket sends it."""
    return [b"", *frames]


def told(**changes: Any) -> Change:
    """Entries of the shim's own field are others; `...` leaves one out."""

    def change(frames: list[bytes]) -> list[bytes]:
        message = _read(frames)
        if message is None or not isinstance(message.get(FIELD), dict):
            return frames
        message[FIELD] = {
            name: value for name, value in (message[FIELD] | changes).items() if value is not ...
        }
        return [_encode(message)]

    return change


def fieldless(**changes: Any) -> Change:
    """The shim's own field is missing, and the host's are others."""

    def change(frames: list[bytes]) -> list[bytes]:
        message = _read(frames)
        # To a listener that would be a whole message of an unpatched decode rank.
        if message is None or (message.get(FIELD) or {}).get("kind") == "ask":
            return frames
        message.pop(FIELD, None)
        return [_encode(message | changes)]

    return change


def _read(frames: list[bytes]) -> dict[str, Any] | None:
    try:
        found = _decode(frames[-1])
    except (msgspec.DecodeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# What may become of an answer.
ANSWERS: dict[str, Change] = {
    **{f"garbage {number}": raw(one) for number, one in enumerate(GARBAGE)},
    "cut short": cut_short,
    "several frames": more_frames,
    "error without the field": fieldless(status=2, err_msg="no", ok_reqs=None, err_reqs=None),
    "end without the field": fieldless(status=0, ok_reqs=None, err_reqs=None),
    "failure without the field": fieldless(status=0, ok_reqs=None, err_reqs=["d1", "d2"]),
    "another nonce": told(nonce="0" * 32),
    "another nonce, failed": told(nonce="0" * 32, state="failed", again=True),
    "no nonce": told(nonce=...),
    "a nonce of another type": told(nonce=7),
    "another version": told(protocol=2),
    "another version, failed": told(protocol=2, state="failed"),
    "another epoch": told(epoch="0" * 34),
    "another epoch, failed": told(epoch="0" * 34, state="failed"),
    "another epoch, done": told(epoch="0" * 34, state="done"),
    "an epoch of another type": told(epoch=["x"]),
    "an unknown state": told(state="elsewhere"),
    "a state of another type": told(state=2**63),
    "no state": told(state=...),
    "no side": told(side=None),
}

# What may become of a message to a listener.
ASKS: dict[str, Change] = {
    **{f"garbage {number}": raw(one) for number, one in enumerate(GARBAGE)},
    "cut short": cut_short,
    "several frames": more_frames,
    "without the field": fieldless(),
    "an unknown kind": told(kind="take"),
    "a kind of another type": told(kind=[]),
    "no epoch": told(epoch=...),
    "an epoch of another type": told(epoch={"x": 1}),
    "another version": told(protocol=2),
    "a transfer of another type": told(transfer=5),
    "a rank out of range": told(rank=10**6),
    "a negative rank": told(rank=-1),
    "no side": told(side=None),
    "a side of nothing": told(side={}),
    "a believed size": told(prefill_tp=2**62),
}


def wild(chooser: random.Random, value: Any, depth: int = 0) -> Any:
    """The same with one entry of it, somewhere, replaced by a value of another kind or size."""
    if isinstance(value, dict) and value and chooser.random() < 0.85:
        key = chooser.choice(sorted(value, key=str))
        return value | {key: wild(chooser, value[key], depth + 1)}
    if isinstance(value, list) and value and chooser.random() < 0.7:
        place = chooser.randrange(len(value))
        return [*value[:place], wild(chooser, value[place], depth + 1), *value[place + 1 :]]
    return anything(chooser)


def anything(chooser: random.Random, depth: int = 0) -> Any:
    """Any value that msgpack has."""
    kind = chooser.randrange(12 if depth < 4 else 9)
    if kind < 3:
        return chooser.choice(HUGE)
    if kind == 3:
        return chooser.choice((1, -1)) * chooser.getrandbits(chooser.randrange(1, 63))
    if kind == 4:
        return chooser.getrandbits(64)
    if kind == 5:
        return chooser.choice((float("inf"), float("-inf"), 1e308, -0.0, chooser.random()))
    if kind == 6:
        return "x" * chooser.choice((0, 1, 33, 300, 10_000))
    if kind == 7:
        return chooser.randbytes(chooser.randrange(50))
    if kind == 8:
        return chooser.choice(("ask", "go", "cancel", "done", "failed", "\x1b[31m", "\ud7ff", "é"))
    count = chooser.choice((0, 1, 3) if depth else (0, 1, 3, 40))
    if kind == 9:
        return [anything(chooser, depth + 1) for _ in range(count)]
    if kind == 10:
        return {f"k{i}": anything(chooser, depth + 1) for i in range(count)}
    found: Any = 1
    for _ in range(chooser.choice((5, 60, 400))):
        found = [found] if chooser.random() < 0.5 else {"side": found}
    return found
