"""Files that a reader of the status must survive, drawn at random, and what must hold then.

A file is drawn with what is known of it by its making: that it is a record, that it is none, or
nothing. The report is held to rules of its own, written without the reader's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_patch import _status_read, cli

RECORD, NO_RECORD, UNKNOWN = "a record", "no record", "either"
NAMES = ["pid", "role", "started", "patches", "kernels", "counters", "verification", "problems"]
ODD: list[Any] = [
    None, True, False, -1, 0, 2**63, 2**64, -(2**70), 10**300, 1.5, -0.0, 1e308, "", "x" * 5000,
    "\x1b[31mred\x07", "\x9b2J", "\u202egnp.exe", "\ud800", "\x00", "\r\n\n", "NaN", "1", [], {},
    [[]], [None], {"": 0}, {"\x1b]0;t\x07": "\x1b"}, ["a"] * 300, {"id": 1}, [1, "a", None],
]  # fmt: skip
WORDS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x10", "1.", "01", "'a'"]


@dataclass(frozen=True)
class Drawn:
    """A file to be: how it is made, and what is known of it."""

    kind: str
    known: str
    make: Callable[[Path], None]


def full_record(pid: int = 1) -> dict[str, Any]:
    """A record in which every field that a reader looks at has something."""
    target = {"id": "vllm.ops:f", "seam": "host", "state": "applied", "reason": "r", "calls": 3}
    patch = {
        "id": "demo", "version": "1", "state": "applied", "reason": "because", "by_name": True,
        "targets": [target, dict(target, id="vllm.more:g")], "notes": ["a note"],
    }  # fmt: skip
    compared = {
        "compared": 2, "calls": 10, "error": 0.5, "limit": 4.0, "unit": "epsilons", "where": "w",
        "notes": ["n"],
    }  # fmt: skip
    return {
        "format": 1, "ascend_patch": "1", "pid": pid, "parent": 1, "role": "EngineCore",
        "command": "python", "started": 1.7e9, "begins_run": True, "ended": None,
        "counting": {"kept": "mapped", "file_system": "ext4"}, "door": "pth", "selection": "all",
        "host": "vllm", "host_reason": "h", "versions": {"vllm": "1.0"}, "device": "cpu",
        "device_reason": "d", "problems": ["p"], "peers": ["a peer"], "patches": [patch],
        "kernels": {"rope": 4}, "left_to_host": {"demo: r": 1}, "verification": {"demo": compared},
        "self_tests": {"demo": "12 cases"}, "counters": ["demo/vllm.ops:f", "kernel/rope"],
    }  # fmt: skip


def draw(rng: random.Random, pid: int, healthy: Path) -> Drawn:
    """One file."""
    record = full_record(pid)
    kind = rng.choice(KINDS)
    return kind(rng, record, healthy)


def _text(kind: str, known: str, text: str | bytes) -> Drawn:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return Drawn(kind, known, lambda path: path.write_bytes(data))


def _sound(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    """A record as it is, with a field more, or without one that older versions did not write."""
    if rng.random() < 0.5:
        record[f"later_{rng.random()}"] = rng.choice([1, "a", [1.5, None], {"deep": [{}]}])
    for name in ("problems", "peers", "kernels", "left_to_host", "verification", "counting"):
        if rng.random() < 0.3:
            del record[name]
    record["role"] = rng.choice(["front end", "启动", "\x1b[31m", "VllmWorker-0"])
    return _text("a record", RECORD, json.dumps(record, indent=rng.choice([None, 1])))


def _bytes(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    data = bytearray(json.dumps(record).encode())
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 40)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 200)]
        if not data:
            break
    return _text("mutated bytes", UNKNOWN, bytes(data))


def _cut(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    text = json.dumps(record)
    return _text("cut", NO_RECORD, text[: rng.randrange(len(text))])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def _odd(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    """Another type or value anywhere, or something taken away."""
    for _ in range(rng.choice([1, 1, 1, 3])):
        *way, last = rng.choice(list(places(record)))
        holder: Any = record
        for key in way:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return _text("an odd value", UNKNOWN, json.dumps(record))


def _needed(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    name = rng.choice(["pid", "role", "started", "patches"])
    if rng.random() < 0.5:
        del record[name]
    else:
        record[name] = rng.choice([None, {}, {"a": 1}, True, [1], -1])
    return _text("without a field", NO_RECORD, json.dumps(record))


def _other_words(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    text = json.dumps(record).replace("1700000000.0", rng.choice(WORDS))
    return _text("words of no JSON", NO_RECORD, text)


def _value(rng: random.Random, depth: int = 0) -> Any:
    if depth > 4 or rng.random() < 0.4:
        return rng.choice(ODD)
    if rng.random() < 0.5:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    keys = [*NAMES, "", "\x1b"]
    return {rng.choice(keys): _value(rng, depth + 1) for _ in range(rng.randrange(5))}


def _random(rng: random.Random, _: dict[str, Any], __: Path) -> Drawn:
    return _text("random JSON", NO_RECORD, json.dumps(_value(rng)))


def _noise(rng: random.Random, _: dict[str, Any], __: Path) -> Drawn:
    return _text("noise", NO_RECORD, rng.randbytes(rng.randrange(3000)))


def _deep(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    many = rng.choice([20, 200, 990, 5000, 100_000])
    match rng.randrange(4):
        case 0:
            return _text("deep, not closed", NO_RECORD, "[" * many)
        case 1:
            return _text("deep", NO_RECORD, "[" * many + "]" * many)
        case 2:
            return _text("deep objects", NO_RECORD, '{"a":' * many + "1" + "}" * many)
        case _:
            record["later"] = "HERE"
            text = json.dumps(record).replace('"HERE"', "[" * many + "]" * many)
            return _text("deep in a record", NO_RECORD, text)


def _large(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    text = json.dumps(record)

    def make(path: Path) -> None:
        path.write_text(text)
        os.truncate(path, rng.choice([(4 << 20) + 1, 1 << 33, 1 << 40]))

    return Drawn("large", NO_RECORD, make)


def _not_regular(rng: random.Random, _: dict[str, Any], healthy: Path) -> Drawn:
    (record,) = healthy.glob("*.json")
    made: dict[str, Callable[[Path], None]] = {
        "FIFO": os.mkfifo,
        "directory": Path.mkdir,
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link to a record": lambda path: path.symlink_to(record),
        "link to nothing": lambda path: path.symlink_to(path),
    }
    if os.geteuid() == 0:
        made["device zero"] = lambda path: os.mknod(path, 0o20600, os.makedev(1, 5))
        made["device full"] = lambda path: os.mknod(path, 0o20600, os.makedev(1, 7))
    kind = rng.choice(list(made))
    return Drawn(kind, NO_RECORD, made[kind])


def _of_others(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    text = json.dumps(record)

    def make(path: Path) -> None:
        path.write_text(text)
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)

    return Drawn("of another user", OF_ANOTHER if os.geteuid() == 0 else RECORD, make)


OF_ANOTHER = "a record of another user"


def _odd_counters(rng: random.Random, record: dict[str, Any], _: Path) -> Drawn:
    """A record beside a file of counters that is none."""

    def make(path: Path) -> None:
        path.write_text(json.dumps(record))
        calls = path.with_suffix(".calls")
        match rng.randrange(4):
            case 0:
                calls.write_bytes(rng.randbytes(rng.choice([0, 3, 8, 4095, 4097, 9000])))
            case 1:
                calls.write_bytes(b"\xff" * 4096)
            case 2:
                os.mkfifo(calls)
            case _:
                calls.symlink_to("/dev/zero")

    return Drawn("odd counters", RECORD, make)


KINDS = [
    _sound, _bytes, _bytes, _bytes, _cut, _odd, _odd, _odd, _odd, _needed, _other_words, _random,
    _random, _noise, _deep, _large, _not_regular, _not_regular, _of_others, _odd_counters,
]  # fmt: skip


def report(*words: str) -> str:
    """What `ascend-patch status` prints; whatever it raises is the finding."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["status", *words])
    return out.getvalue()


def check(
    drawn: dict[str, Drawn],
    healthy: str,
    alive: dict[str, Any],
    *,
    named: bool,
    words: tuple[str, ...],
) -> None:
    """Hold the report of a batch to its rules.

    Args:
        drawn: The files by their stems, all in one run.
        healthy: The run of a server beside them.
        alive: That server's record in a report before.
        named: Whether the directory was named explicitly, so that other users' files are read.
        words: The options of the report.
    """
    found = _status_read.read()
    runs = {run["id"]: run for run in found.runs}
    assert runs.pop(healthy) == alive, "a healthy server is hidden"
    taken = {process["pid"]: process for run in runs.values() for process in run["processes"]}
    assert len(taken) + len(found.problems) - bool(found.problems_more) + found.problems_more == (
        len(drawn)
    ), "a file is neither shown nor told"
    for stem, one in drawn.items():
        known = one.known
        if known == OF_ANOTHER:
            known = RECORD if named else NO_RECORD
        pid = int(stem.partition("-")[0])
        assert known == UNKNOWN or (pid in taken) == (known == RECORD), f"{one.kind} is {known}"
        if pid in taken:
            sound(taken[pid])
    text = report(*words)
    assert text.replace("\n", "").isprintable(), "a control character is printed"
    assert healthy in text
    if "--json" in words:
        everything = json.loads(text, parse_constant=lambda name: 1 / 0)
        assert [run["id"] for run in everything["runs"]] == [run["id"] for run in found.runs]


def sound(process: dict[str, Any]) -> None:
    """Whether a process of the report has what everybody who reads it relies on."""
    assert all(isinstance(process[name], str) for name in ("role", "host", "device", "selection"))
    assert isinstance(process["pid"], int)
    # No process can have such an id.
    assert process["alive"] is False
    assert math.isfinite(process["started"])
    for patch in process["patches"]:
        assert all(isinstance(patch[name], str) for name in ("id", "state", "reason"))
        for target in patch["targets"]:
            assert isinstance(target["state"], str)
            assert type(target["calls"]) is int
            assert 0 <= target["calls"] < 2**64
    for counted in (process["kernels"], process["left_to_host"]):
        assert all(type(count) is int and count >= 0 for count in counted.values())
