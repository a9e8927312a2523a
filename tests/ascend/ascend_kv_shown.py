"""What the hostile cases of MooncakeConnectorV1 have to show, on real classes and on the stand-in.

Each function takes what a case of `ascend_kv_hostile`, `ascend_kv_storm` or `ascend_kv_fuzz` found.
"""

from __future__ import annotations

from typing import Any

LOCAL = [1, 3, 5]
# Of memory, and milliseconds until a well-behaved peer is answered.
GROWS, ANSWERED_MS = 16 << 20, 100.0


def failed(heard: dict[str, Any]) -> bool:
    """A request that ended, and not as right: its blocks, or in 0.11 itself, were reported."""
    return heard["done"] and bool(heard["invalid"] or heard["early"])


def right(heard: dict[str, Any]) -> bool:
    """A request that ended well."""
    return heard["done"] and not heard["invalid"] and not heard["early"]


def check_floods(found: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Messages of any kind leave nothing behind, and a well-behaved peer is answered in time."""
    for kind in kinds:
        one = found[kind]
        assert one["sent"] == "sent", kind
        assert one["grown"] < GROWS, (kind, one["grown"])
        assert one["asked"] > 5, kind
        # Of a busy machine an answer or two may be late all the same; one that stands is not.
        assert one["late"] <= max(2, one["asked"] // 50), (kind, one)
        assert one["slowest"] < 10 * ANSWERED_MS + one["quiet"], (kind, one)
    assert found["tracked"] == 0
    assert all(right(one) for one in found["after"])
    assert all(found["right"])


def check_ends(found: dict[str, Any]) -> None:
    """A message that a read has ended frees what was kept for it, and once."""
    assert found["running"] == [], "blocks of a request that is computed were freed"
    assert found["ran"] == ["running"], "a message that came early was lost"
    assert found["never"] == []
    assert found["earlier"] == [], "a message of an earlier attempt freed the blocks"
    assert found["this"] == ["again"]
    if "both" in found:
        assert found["one of two"] == [], "a reader that said it twice was counted twice"
        assert found["both"] == ["two"]


def check_metadata(found: dict[str, Any]) -> None:
    """What a prefill rank says of itself is checked before the engine reads anything."""
    assert right(found["first"]["heard"])
    assert found["right"] == [True], "it was read where another machine said that it lies"
    for name in ("behind the caches", "few addresses", "negative addresses", "port", "no blocks"):
        assert failed(found[name]["heard"]), name
        assert found[name]["reads"] == 0, name


def check_engines(found: dict[str, Any]) -> None:
    """After many names of engines that are not there, one that is there is read from."""
    assert all(right(one) for one in found["one"])
    assert found["right"] == [True]
    assert found["known"] < 2000


def check_roles(found: dict[str, Any]) -> None:
    """A request that is sent to the wrong server is computed there; none ends the engine."""
    assert found["pull of prefill"] == [0, False]
    assert found["pull of decode"] == [9, True]
    assert found["no blocks"] == [0, False]
    assert found["decode keeps"] is False
    assert found["prefill keeps"] is True


def check_parameters(found: dict[str, Any]) -> None:
    """Whatever kv_transfer_params say: nothing is raised in the engine, and it is done soon."""
    assert found["raised"] == []
    assert found["wrong"] == []
    assert found["slowest"] < 0.5
    # The control: those that can be are taken.
    assert found["admitted"] > found["tried"] // 20


def check_wire(found: dict[str, Any]) -> None:
    """Whatever a prefill rank says of itself: it is taken or refused, and soon."""
    assert found["raised"] == []
    assert found["slowest"] < 0.5
    assert found["taken"] > found["tried"] // 20
    assert found["refused"] > found["tried"] // 20


def check_storm(found: dict[str, Any], attempts: int, stalled: int) -> None:
    """No byte of a read that was given up lands in another's block, and none ends as right."""
    assert found["hurt"] == []
    assert found["wrong"] == []
    assert found["as right"] == []
    assert found["newer"] >= attempts
    assert found["right"] == found["newer"], "newer requests did not all end well"
    # The request fails while its blocks are kept; when its rank goes on they are given back.
    assert not any(found["before"].values())
    assert len(found["reported"]) in (0, stalled)
    assert found["ended"]


def check_retries(found: dict[str, Any], attempts: int) -> None:
    """All attempts are given up while the rank answers: the request fails soon."""
    assert found["hurt"] == []
    assert found["wrong"] == []
    assert found["as right"] == []
    assert found["right"] == found["newer"] >= attempts
    assert found["ended"]


def check_restart(found: dict[str, Any], attempts: int) -> None:
    """The stalled rank ends: its bytes have had their time, and the blocks are given back."""
    assert found["hurt"] == []
    assert found["wrong"] == []
    assert found["as right"] == []
    assert found["before"] == {"stalled": True}
    assert found["right"] == found["newer"] >= attempts


def check_ipv6(found: dict[str, Any]) -> None:
    """IPv6 addresses work; a port that is taken is named. 0.11.0 starts no engine there itself."""
    if "refused" in found:
        assert "does not support IPv6" in found["refused"]
        return
    assert right(found["heard"])
    assert found["right"] == [True]
    assert "a prefill rank cannot listen at tcp://[::1]:" in found["taken"]


def check_freed(found: dict[str, Any]) -> None:
    """Blocks that prefill freed while they were read are not the request's any more."""
    assert found["reads"] == 2
    assert right(found["control"])
    assert failed(found["freed"]), "what was read of blocks that were another's by then was right"


def check_refuses(found: dict[str, Any]) -> None:
    """With too many blocks kept nothing more is pulled, until the ranks have answered."""
    assert found["refused ends"]
    assert found["refused right"] is False
    assert found["kept"] == 0
    assert found["hurt"] == []
    assert found["ended"]
    assert found["after"] is True
    assert found["wrong"] == []
