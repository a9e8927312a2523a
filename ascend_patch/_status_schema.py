"""Checks a record of the status before anything is read from it: types, ranges, depth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from ascend_patch import _state
from ascend_patch._files import MAX_BYTES
from ascend_patch._liveness import MAX_PID

Check = Callable[[Any, str], Any]

MAX_DEPTH = 16
MAX_COUNT = 2**64 - 1
# The longest time that is one, in seconds: the year 9999.
MAX_TIME = 253402300800.0


class MalformedError(ValueError):
    """The record cannot be used; the message says where and why, without control characters."""


def record(data: bytes, pid: int) -> dict[str, Any]:
    """The record of a process, with everything in it that a report reads.

    Args:
        data: The content of its file.
        pid: The process that the file's name says.

    Raises:
        MalformedError: It is no JSON, or not as the shim writes it.
    """
    if len(data) > MAX_BYTES:
        raise MalformedError(f"it has more than {MAX_BYTES} bytes")
    try:
        found = json.loads(data.decode(), parse_constant=_refuse, parse_int=_whole)
    except RecursionError:
        raise MalformedError("its JSON is nested too deeply") from None
    except MalformedError:
        raise
    except ValueError as error:
        # Not what the error quotes: a UnicodeDecodeError holds the file.
        position = getattr(error, "pos", getattr(error, "start", None))
        where = "" if position is None else f" from byte {position} on"
        raise MalformedError(f"it is no JSON in UTF-8{where}") from None
    _bounded(found)
    cleaned: dict[str, Any] = _RECORD(found, "the record")
    if cleaned["format"] > _state.FORMAT:
        raise MalformedError(
            f"it has format {cleaned['format']}, and this version reads {_state.FORMAT}; "
            f"ascend-patch {shown(cleaned['ascend_patch'])} has written it"
        )
    if cleaned["pid"] != pid:
        raise MalformedError(f"it is of process {cleaned['pid']}, and its name of {pid}")
    return cleaned


def shown(value: object) -> str:
    """A value in a sentence: short, and without control characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = printable(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def printable(text: str) -> str:
    """The text with everything escaped that a terminal acts upon, or that cannot be encoded."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _refuse(name: str) -> NoReturn:
    raise MalformedError(f"it holds {name}, which is no number of JSON")


def _whole(digits: str) -> int:
    # Before it is converted: that takes a time that grows with the square of the length.
    if len(digits) > 20:
        raise MalformedError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _bounded(found: Any) -> None:
    """Refuse depth and numbers beyond all bounds, wherever they are."""
    waiting = [(found, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise MalformedError(f"its JSON is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise MalformedError("it holds a number that is not finite")
        elif isinstance(value, int) and abs(value) > MAX_COUNT:
            raise MalformedError(f"it holds {shown(value)}, a number out of range")


def _expected(what: str, value: object, where: str) -> MalformedError:
    return MalformedError(f"{where} is {shown(value)}, expected {what}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _expected("a text", value, where)
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _expected("true or false", value, where)
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _expected("a number", value, where)
    return value


def _time(value: Any, where: str) -> float:
    if not 0 <= _number(value, where) <= MAX_TIME:
        raise _expected("a time in seconds", value, where)
    return float(value)


def _count(high: int, low: int = 0) -> Check:
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _expected(f"a whole number from {low} to {high}", value, where)
        return value

    return check


def _or_none(of: Check) -> Check:
    return lambda value, where: None if value is None else of(value, where)


def _list(of: Check) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _expected("a list", value, where)
        return [of(item, f"{where}[{index}]") for index, item in enumerate(value)]

    return check


def _mapping(of: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _expected("an object", value, where)
        return {key: of(item, f"{where}[{shown(key)}]") for key, item in value.items()}

    return check


def _object(needed: dict[str, Check], optional: dict[str, tuple[Check, Any]]) -> Check:
    """An object with these fields; `optional` has those that older versions did not write.

    Other fields are kept as they are: a later version may have added them.
    """

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _expected("an object", value, where)
        found = dict(value)
        for name, of in needed.items():
            if name not in value:
                raise MalformedError(f"{where} has no {name}")
            found[name] = of(value[name], name if where == "the record" else f"{where}.{name}")
        for name, (of, default) in optional.items():
            given = value[name] if name in value else json.loads(json.dumps(default))
            found[name] = of(given, name if where == "the record" else f"{where}.{name}")
        return found

    return check


_TARGET = _object(
    {"id": _text, "state": _text, "reason": _text, "calls": _count(MAX_COUNT)},
    {"seam": (_text, "")},
)
_PATCH = _object(
    {"id": _text, "state": _text, "reason": _text, "targets": _list(_TARGET)},
    {"version": (_text, ""), "by_name": (_truth, False), "notes": (_list(_text), [])},
)
_VERIFIED = _object(
    {
        "compared": _count(MAX_COUNT),
        "calls": _or_none(_count(MAX_COUNT)),
        "error": _or_none(_number),
    },
    {
        "unit": (_text, ""),
        # Of the worst comparison; there may have been none.
        "limit": (_or_none(_number), None),
        "where": (_text, ""),
        "notes": (_list(_text), []),
    },
)
_COUNTING = _object({"kept": _text, "file_system": _text}, {})
_RECORD = _object(
    {
        "pid": _count(MAX_PID, 1),
        "role": _text,
        "started": _time,
        "patches": _list(_PATCH),
    },
    {
        "format": (_count(MAX_COUNT), 0),
        "ascend_patch": (_text, "unknown"),
        "parent": (_count(MAX_PID), 0),
        "command": (_text, ""),
        "door": (_text, ""),
        "selection": (_text, "?"),
        "host": (_text, "?"),
        "host_reason": (_text, ""),
        "versions": (_mapping(_text), {}),
        "device": (_text, "?"),
        "device_reason": (_text, ""),
        "model_loaded": (_truth, False),
        "begins_run": (_truth, True),
        "ended": (_or_none(_time), None),
        "counting": (_COUNTING, {"kept": "mapped", "file_system": ""}),
        "problems": (_list(_text), []),
        "peers": (_list(_text), []),
        "kernels": (_mapping(_count(MAX_COUNT)), {}),
        "left_to_host": (_mapping(_count(MAX_COUNT)), {}),
        "verification": (_mapping(_VERIFIED), {}),
        "self_tests": (_mapping(_text), {}),
        "counters": (_list(_text), []),
    },
)
