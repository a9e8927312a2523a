"""What two sides tell each other: through msgpack and back, and what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from ascend_patch.impl import kv_handshake
from ascend_patch.kernels.kv_layout import LayerGroup, Side

SIDE = Side(
    (LayerGroup(36, 8, (128, 128)), LayerGroup(1, 4, (64, 64), "draft", True)),
    tp=4,
    pp=2,
    block_size=16,
    layout="HND",
    combined=True,
    stages=(20, 16),
)


def told(**changes: Any) -> dict[str, Any]:
    msgspec = pytest.importorskip("msgspec", reason="msgspec comes with vLLM")
    said = msgspec.msgpack.decode(msgspec.msgpack.encode(kv_handshake.say(SIDE, "/models/m")))
    for path, value in changes.items():
        place, _, name = path.rpartition("__")
        (said[place] if place else said)[name] = value
    return said


def test_a_side_arrives_as_it_was_sent() -> None:
    peer = kv_handshake.hear(told())
    assert peer.side == SIDE
    assert peer.model == "/models/m"


def test_what_a_later_shim_adds_is_ignored() -> None:
    assert kv_handshake.hear(told(side__colour="red", more=1)).side == SIDE


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": 2}, "the peer speaks protocol 2"),
        ({"side": None}, "has no side"),
        ({"side__groups": 3}, "has no layers"),
        ({"side__tp": "4"}, "tp='4', which is no int"),
        ({"side__tp": True}, "tp=True, which is no int"),
        ({"side__stages": ["a"]}, "which are no numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_a_sentence(changes, sentence) -> None:
    with pytest.raises(kv_handshake.HandshakeError, match=sentence):
        kv_handshake.hear(told(**changes))
