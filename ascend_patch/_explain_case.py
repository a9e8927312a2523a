"""`explain attention_router --case ...`: the route of one case, and why. No torch, no host."""

from __future__ import annotations

from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from ascend_patch import _registry, _selection
from ascend_patch.kernels.attention.case import ATTENTION_TYPES, DTYPES, HOST, NOTHING, STATES
from ascend_patch.kernels.attention.case import Case as AttentionCase
from ascend_patch.kernels.attention.case import Route as AttentionRoute
from ascend_patch.kernels.attention.route import route

PATCH = "attention_router"
EXAMPLE = "state=chunked,sliding_window=4096,head_size=64"
# soc may be any name: what is not known there is the host's own.
VALUES = {"state": STATES, "attn_type": ATTENTION_TYPES, "dtype": DTYPES}
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
MODES = {0: "0, no mask", 3: "3, causal", 4: "4, a band"}


class CaseError(ValueError):
    """The text names no case; the message says what is wrong with it."""


def parse(text: str) -> AttentionCase:
    """``key=value`` pairs, with commas between them, to a case.

    Raises:
        CaseError: An unknown key or value, one that is missing, or one that is given twice.
    """
    given: dict[str, Any] = {}
    known = {field.name: field for field in fields(AttentionCase)}
    for entry in (part.strip() for part in text.split(",")):
        if not entry:
            continue
        key, equals, value = (part.strip() for part in entry.partition("="))
        if key not in known:
            raise CaseError(
                f"--case has no {_selection.shown(key)}.{_near(key, known)} It takes "
                f"{', '.join(known)}; write for example --case {EXAMPLE}"
            )
        if not equals or not value:
            raise CaseError(f"--case has {key} without a value; write {key}=VALUE")
        if key in given:
            raise CaseError(f"--case has {key} twice; write it once")
        given[key] = _value(key, value, known[key].default)
    if "state" not in given:
        raise CaseError(
            f"--case has no state; write state=STATE, with STATE one of {', '.join(STATES)}"
        )
    return AttentionCase(**given)


def _value(key: str, text: str, default: Any) -> Any:
    """The text as a value of the field's type, which its default has."""
    if key in VALUES:
        if text not in VALUES[key]:
            raise CaseError(
                f"--case has {key}={_selection.shown(text)}.{_near(text, VALUES[key])} It takes "
                f"{', '.join(VALUES[key])}."
            )
        return text
    if isinstance(default, bool):
        if text.lower() not in FLAGS:
            raise CaseError(f"--case has {key}={_selection.shown(text)}; it takes true or false")
        return FLAGS[text.lower()]
    if key == "sliding_window" and text.lower() == "none":
        return None
    if isinstance(default, int) or key == "sliding_window":
        try:
            return int(text)
        except ValueError:
            raise CaseError(
                f"--case has {key}={_selection.shown(text)}; it takes a whole number"
            ) from None
    return text


def _near(text: str, known: Any) -> str:
    near = get_close_matches(text, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def explain(patch_id: str, text: str) -> dict[str, Any]:
    """The case and its route, as plain data.

    Raises:
        CaseError: The text names no case, or the patch has none.
    """
    name = _selection.canonical_id(patch_id)
    if name not in _registry.load():
        raise CaseError(f"there is no patch {patch_id!r}; there are {', '.join(_registry.load())}")
    if name != PATCH:
        raise CaseError(f"--case is for {PATCH}, which has a table of cases; {name} has none")
    case = parse(text)
    return {"case": asdict(case), "route": asdict(route(case))}


def explain_text(patch_id: str, text: str) -> str:
    """`explain` as text; raises CaseError as it does."""
    return as_text(explain(patch_id, text))


def as_text(found: dict[str, Any]) -> str:
    """What `explain` found as text: what was asked, the row, and why."""
    case, chosen = AttentionCase(**found["case"]), AttentionRoute(**found["route"])
    lines = [f"{PATCH}: {_asked(case)}", f"  row          {chosen.row}"]
    if chosen.operator in (HOST, NOTHING):
        lines.append(f"  operator     {'the host' if chosen.operator == HOST else 'none'}")
    else:
        calls = "one for all requests"
        if chosen.per_request:
            calls = "one for each request with several queries, one for the others"
        lines += [
            f"  operator     {chosen.operator}",
            f"  layout       {chosen.layout}",
            f"  sparse mode  {MODES[chosen.sparse_mode]}",
            f"  keys seen    {_keys(chosen)}",
            f"  queries      lengths are {chosen.query_lens}",
            f"  keys         from {_SOURCES[chosen.cache]}; lengths are {chosen.kv_lens}",
            f"  calls        {calls}; workspace: {chosen.workspace}",
        ]
    return "\n".join([*lines, f"  why          {chosen.reason}"])


_SOURCES = {
    "none": "this step",
    "paged": "the cache, by its block table",
    "copied": "the cache, what the requests hold copied into blocks of 128",
    "gathered": "the cache, those in sight copied out of it",
}


def _keys(chosen: AttentionRoute) -> str:
    if chosen.sparse_mode == 0:
        return "all"
    before = "all" if chosen.pre_tokens is None else str(chosen.pre_tokens)
    return f"{before} before a query's own, its own, {chosen.next_tokens or 0} behind"


def _asked(case: AttentionCase) -> str:
    """The state, and what is not as by default."""
    default = AttentionCase(case.state)
    names = [field.name for field in fields(case)]
    said = [f"state={case.state}"]
    said += [
        f"{name}={getattr(case, name)}"
        for name in names
        if getattr(case, name) != getattr(default, name)
    ]
    return ", ".join(said)
