"""Range checks of what the network says: the last value that fits, and the first that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ascend_patch.impl import kv_limits
from ascend_patch.impl.kv_limits import LimitError
from ascend_patch.kernels.kv_layout import LayerGroup, Side

SIDE = Side((LayerGroup(2, 4, (8, 8)),), tp=2)
BIG = 2**63


@pytest.mark.parametrize("value", [0, 10])
def test_whole_numbers_up_to_both_ends_fit(value) -> None:
    assert kv_limits.whole("n", value, 0, 10) == value


@pytest.mark.parametrize("value", [-1, 11, True, False, 1.0, "1", None, [], 10**400])
def test_others_are_refused_in_a_short_sentence(value) -> None:
    with pytest.raises(LimitError, match=r"^n is .*; it must be a whole number from 0 to 10$") as e:
        kv_limits.whole("n", value, 0, 10)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("value", ["", "a\n", "\x1b[31m", "x" * 11, b"x", 5, None])
def test_text_is_printable_and_short(value) -> None:
    assert kv_limits.text("t", "ß 猫", 10) == "ß 猫"
    with pytest.raises(LimitError, match=r"^t is "):
        kv_limits.text("t", value, 10)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("tcp://10.0.0.1:4000", ("10.0.0.1", 4000)),
        ("tcp://[::1]:1", ("::1", 1)),
        ("tcp://a-host.example:65535", ("a-host.example", 65535)),
    ],
)
def test_endpoints(value, found) -> None:
    assert kv_limits.endpoint("e", value) == found
    assert kv_limits.endpoint("e", f"tcp://{kv_limits.session(*found)}") == found


@pytest.mark.parametrize(
    "value",
    [
        *("tcp://h:0", "tcp://h:65536", "tcp://127.0.0.1:99999", "tcp://h", "tcp://::1:1"),
        *("ipc://x", "tcp://h:1/x", "tcp://a b:1", "tcp://[::1:1", "tcp://h:-1", 7, None),
        "tcp://" + "h" * 400,
    ],
)
def test_what_is_no_endpoint(value) -> None:
    with pytest.raises(LimitError):
        kv_limits.endpoint("e", value)


@pytest.mark.parametrize("ids", [[-1], [9], [True], [1, 1], ["1"], 5, [2**70], [1.0]])
def test_block_ids(ids) -> None:
    assert kv_limits.block_ids("b", (0, 8), 9) == [0, 8]
    assert kv_limits.block_ids("b", [], 9) == []
    with pytest.raises(LimitError):
        kv_limits.block_ids("b", ids, 9)


def test_a_request_has_so_many_blocks() -> None:
    most = kv_limits.MAX_REQUEST_BLOCKS
    assert len(kv_limits.block_ids("b", range_of(most))) == most
    with pytest.raises(LimitError, match=f"at most {most} entries"):
        kv_limits.block_ids("b", range_of(most + 1))


def range_of(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize("found", [[0], [-1], [BIG - 99], [True], [1, 2], [], ["1"]])
def test_addresses_end_below_2_to_the_63(found) -> None:
    assert kv_limits.addresses("a", [BIG - 100], [100]) == [BIG - 100]
    with pytest.raises(LimitError):
        kv_limits.addresses("a", found, [100])


def test_a_side_within_the_limits() -> None:
    assert kv_limits.side(SIDE) is SIDE
    largest = replace(SIDE, tp=kv_limits.MAX_TP, pp=kv_limits.MAX_WORLD // kv_limits.MAX_TP)
    assert kv_limits.side(largest) is largest


@pytest.mark.parametrize(
    "changes",
    [{"tp": n} for n in (0, -1, 257, 8000, BIG, True)]
    + [{"pp": n} for n in (0, 257, 30_000_000)]
    + [{"tp": 256, "pp": 64}, {"block_size": 0}, {"block_size": BIG}, {"itemsize": 17}]
    + [{"context_parallel": 0}, {"kv_cache_groups": 0}, {"stages": (0,)}, {"stages": (1,) * 257}]
    + [{"layout": "x" * 33}, {"dtype": "\n"}, {"storage": 5}, {"combined": 1}, {"groups": ()}]
    + [{"groups": (LayerGroup(*given),)} for given in ((0, 1, (1,)), (1025, 1, (1,)))]
    + [{"groups": (LayerGroup(*given),)} for given in ((1, 0, (1,)), (1, 1, ()), (1, 1, (0,)))]
    + [{"groups": tuple(LayerGroup(1, 1, (1,), f"g{n}") for n in range(9))}]
    + [{"groups": (LayerGroup(600, 1, (1,), "a"), LayerGroup(600, 1, (1,), "b"))}],
    ids=lambda changes: str(changes)[:60],
)
def test_a_side_out_of_them(changes) -> None:
    with pytest.raises(LimitError):
        kv_limits.side(replace(SIDE, **changes))
