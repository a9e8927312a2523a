"""What one side of a KV transfer tells the other: optional fields of the host's own messages.

An unpatched peer ignores them and sends none. What is told is enough to plan the transfer
(`kernels.kv_layout`), and who is speaking; a plan's refusals are the checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ascend_patch import __version__
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
        HandshakeError: A field is missing or of another type, or the protocol is another one.
    """
    if told.get("protocol") != PROTOCOL:
        raise HandshakeError(
            f"the peer speaks protocol {told.get('protocol')!r} of ascend-patch "
            f"{told.get('shim', '?')}, and this side {PROTOCOL} of {__version__}; install the same "
            "version on both sides"
        )
    given = told.get("side")
    if not isinstance(given, Mapping):
        raise HandshakeError(f"the peer's handshake has no side: {given!r}")
    groups = given.get("groups")
    if not isinstance(groups, list | tuple):
        raise HandshakeError(f"the peer's handshake has no layers: {groups!r}")
    values = _read(Side, given, skip=("groups", "stages"))
    side = Side(
        groups=tuple(
            LayerGroup(widths=_numbers(g, "widths"), **_read(LayerGroup, g, skip=("widths",)))
            for g in groups
        ),
        stages=_numbers(given, "stages"),
        **values,
    )
    return Peer(side, str(told.get("model", "")), str(told.get("shim", "?")))


def _read(kind: type, given: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for one in fields(kind):
        if one.name in skip:
            continue
        value, wanted = given.get(one.name), TYPES[str(one.type)]
        if type(value) is not wanted:
            raise HandshakeError(
                f"the peer's handshake says {one.name}={value!r}, which is no {wanted.__name__}; "
                "install the same ascend-patch on both sides"
            )
        found[one.name] = value
    return found


def _numbers(given: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = given.get(name)
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise HandshakeError(f"the peer's handshake says {name}={values!r}, which are no numbers")
    return tuple(values)


def both_sides(ratio: str, unpatched: str) -> str:
    """What to do about a ratio that only two patched sides can move."""
    return (
        f"{ratio} needs ascend-patch on both sides, and the {unpatched} server answers without it; "
        "set ASCEND_PATCHES=kv_connector there, or give both the same --tensor-parallel-size"
    )
