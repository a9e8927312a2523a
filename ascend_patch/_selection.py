"""The grammar of ASCEND_PATCHES: which patches the user asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches

from ascend_patch._env import PATCHES as VARIABLE
from ascend_patch._env import SettingError, is_not_activated, shown

__all__ = ["VARIABLE", "Selection", "SelectionError", "canonical_id", "is_off", "parse", "shown"]


class SelectionError(SettingError):
    """ASCEND_PATCHES holds something that cannot be understood."""


@dataclass(frozen=True)
class Selection:
    """The patches that are wanted.

    Attributes:
        ids: The wanted patch ids, in the order of the registry.
        by_name: Those among them that were asked for by name: a wish, not a fail-open default.
    """

    ids: tuple[str, ...]
    by_name: frozenset[str]


def canonical_id(text: str) -> str:
    """`Patch_Rotary`, `patch-rotary` and ` rotary ` all mean `rotary`."""
    return text.strip().lower().replace("-", "_").removeprefix("patch_")


def is_off(value: str | None) -> bool:
    """Whether the value leaves the shim off altogether."""
    return value is None or is_not_activated(value)


def parse(value: str, known: Collection[str], in_all: Collection[str]) -> Selection:
    """Read a value of ASCEND_PATCHES.

    Args:
        value: `all`, `rotary,gdn_attn`, `all,-kv_connector`, `-kv_connector` (all but that one),
            or one of the words for off.
        known: Every patch id there is, in the registry's order.
        in_all: The ids that `all` stands for.

    Raises:
        SelectionError: An entry is no known patch, or there is none; the message has the nearest
            known name.
    """
    if is_off(value):
        return Selection((), frozenset())
    wanted: set[str] = set()
    named: set[str] = set()
    refused: set[str] = set()
    for entry in (part.strip() for part in value.split(",")):
        if not entry:
            continue
        minus = entry.startswith("-")
        name = canonical_id(entry[1:] if minus else entry)
        if name == "all":
            if minus:
                raise SelectionError(_sentence(value, entry, "`-all` has no meaning", known))
            wanted.update(in_all)
        elif name not in known:
            raise SelectionError(_sentence(value, entry, "there is no such patch", known))
        elif minus:
            refused.add(name)
        else:
            named.add(name)
    if not (wanted or named):
        if not refused:
            raise SelectionError(_sentence(value, value, "it names no patch", known))
        wanted.update(in_all)
    ids = tuple(name for name in known if name in (wanted | named) - refused)
    return Selection(ids, frozenset(named - refused))


def _sentence(value: str, entry: str, what: str, known: Collection[str]) -> str:
    names = ", ".join(known)
    return (
        f"{VARIABLE}={shown(value)}: {what}: {shown(entry)}.{did_you_mean(entry, known)} "
        f"Write `all`, or names out of: {names}; `-name` leaves one out; `none` is off."
    )


def did_you_mean(entry: str, known: Collection[str]) -> str:
    """The nearest known name as a sentence with a space before it, or nothing."""
    near = get_close_matches(canonical_id(entry.lstrip("-")), [*known, "all"], n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
