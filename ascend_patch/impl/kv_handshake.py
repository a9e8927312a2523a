"""What one side of a KV transfer tells the other: optional fields of the host's own messages.

An unpatched peer ignores them and sends none. What is told is enough to plan the transfer
(`kernels.kv_layout`), and who is speaking; a plan's refusals are the checks.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ascend_patch import __version__
from ascend_patch.impl import kv_limits
from ascend_patch.kernels.kv_layout import LayerGroup, Side

# The name of the one field that carries all of ours.
FIELD = "ascend_patch"
# Of the messages, not of the shim. A peer with another one cannot be understood.
PROTOCOL = 1
TYPES = {"int": int, "str": str, "bool": bool}


class HandshakeError(ValueError):
    """What a peer says cannot be read; the message says what it was."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end.

    Attributes:
        side: How it cuts the model's caches to its ranks.
        model: What it calls its model; paths differ between machines, so it is only reported.
        shim: Its version of ascend_patch.
    """

    side: Side
    model: str
    shim: str


def say(side: Side, model: str) -> dict[str, Any]:
    """The fields of this side, as plain data for msgpack or JSON."""
    return {"protocol": PROTOCOL, "shim": __version__, "model": model, "side": asdict(side)}


def hear(told: Mapping[str, Any]) -> Peer:
    """Read the fields of a peer; names that a later shim adds are ignored.

    Raises:
        HandshakeError: A field is missing, of another type or out of range, or the protocol is
            another one.
    """
    try:
        return _hear(told)
    except kv_limits.LimitError as error:
        raise HandshakeError(
            f"the peer's handshake cannot be used: {error}; install the same ascend-patch on both "
            "sides"
        ) from None


def _hear(told: Mapping[str, Any]) -> Peer:
    shim = kv_limits.text("shim", told.get("shim", "?"), 64)
    protocol = told.get("protocol")
    if type(protocol) is not int or protocol != PROTOCOL:
        kv_limits.whole("protocol", protocol, 0, 1 << 31)
        raise HandshakeError(
            f"the peer speaks protocol {protocol} of ascend-patch {shim}, and this side {PROTOCOL} "
            f"of {__version__}; install the same version on both sides"
        )
    given = told.get("side")
    if not isinstance(given, Mapping):
        raise HandshakeError("the peer's handshake has no side")
    groups = given.get("groups")
    if not isinstance(groups, list | tuple):
        raise HandshakeError("the peer's handshake has no layers")
    kv_limits.sequence("groups", groups, kv_limits.MAX_GROUPS)
    if not all(isinstance(group, Mapping) for group in groups):
        raise HandshakeError("a group of layers in the peer's handshake has no fields")
    values = _read(Side, given, skip=("groups", "stages"))
    side = Side(
        groups=tuple(
            LayerGroup(widths=_numbers(g, "widths"), **_read(LayerGroup, g, skip=("widths",)))
            for g in groups
        ),
        stages=_numbers(given, "stages"),
        **values,
    )
    model = kv_limits.text("model", told.get("model", ""), kv_limits.MAX_TEXT, least=0)
    return Peer(kv_limits.side(side), model, shim)


def _read(kind: type, given: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for one in fields(kind):
        if one.name in skip:
            continue
        value, wanted = given.get(one.name), TYPES[str(one.type)]
        if type(value) is not wanted:
            raise HandshakeError(
                f"the peer's handshake says {one.name}={reprlib.repr(value)}, which is no "
                f"{wanted.__name__}; install the same ascend-patch on both sides"
            )
        found[one.name] = value
    return found


def _numbers(given: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = given.get(name)
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise HandshakeError(
            f"the peer's handshake says {name}={reprlib.repr(values)}, which are no numbers"
        )
    return tuple(kv_limits.sequence(name, values, kv_limits.MAX_PP))


def both_sides(ratio: str, unpatched: str) -> str:
    """What to do about a ratio that only two patched sides can move."""
    return (
        f"{ratio} needs ascend-patch on both sides, and the {unpatched} server answers without it; "
        "set ASCEND_PATCHES=kv_connector there, or give both the same --tensor-parallel-size"
    )
