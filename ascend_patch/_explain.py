"""Why a patch applies here or not, target by target; and what there is at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.specifiers import SpecifierSet

from ascend_patch import _plan, _records, _registry, _selection, _versions
from ascend_patch._registry import Band, Patch, Target
from ascend_patch._versions import Installed


def explain_text(patch_id: str) -> str:
    """`explain` as text; see `ascend_patch.explain`.

    Raises:
        KeyError: There is no such patch; the message names the known ones.
    """
    return as_text(explain(patch_id))


def as_text(found: dict[str, Any]) -> str:
    """What `explain` found as text, in which no sentence is said twice."""
    lines = [
        f"{found['id']} (version {found['version']}): {found['summary']}",
        f"  why          {found['why']}",
        f"  upstream     {found['upstream']}",
        f"  remove when  {found['remove_when']}",
        f"  here         {found['state']}: {found['reason']}",
        f"  selected     {found['selected']}",
    ]
    if not found["installed"]:
        return "\n".join([*lines, f"  applies to   {found['applies_to']}"])
    said = {found["reason"]}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, band in enumerate(found["bands"]):
        # One whose targets are worth reading stands alone.
        key = number if band["in_question"] else (band["state"], band["reason"])
        groups.setdefault(key, []).append(band)
    for bands in groups.values():
        state, reason = bands[0]["state"], bands[0]["reason"]
        why = "" if reason in said else f": {reason}"
        said.add(reason)
        lines.append(f"  {'; '.join(band['name'] for band in bands)}: {state}{why}")
        if bands[0]["in_question"]:
            lines.extend(_target_lines(bands[0]["targets"], said))
    if found["untouched"]:
        lines.append("  left as it is:")
        lines.extend(f"    {sentence}" for sentence in found["untouched"])
    return "\n".join(lines)


def _target_lines(targets: list[dict[str, Any]], said: set[str]) -> Iterator[str]:
    """The targets, those with the same reasons together, and below them what was not said yet."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for target in targets:
        groups.setdefault(tuple(target["reasons"]), []).append(target)
    for reasons, alike in groups.items():
        for target in alike:
            yield f"    {target['state']:<11} {target['id']} ({target['seam']} seam)"
        new = [sentence for sentence in reasons if sentence not in said]
        said.update(new)
        yield from (f"                {sentence}" for sentence in new)
        if len(new) < len(reasons):
            yield f"                {'and ' if new else ''}{len(reasons) - len(new)} named above"


def explain(patch_id: str) -> dict[str, Any]:
    """Everything about one patch in this environment, as plain data.

    Raises:
        KeyError: There is no such patch; the message names the known ones.
    """
    registry = _registry.load()
    name = _selection.canonical_id(patch_id)
    if name not in registry:
        raise KeyError(f"there is no patch {patch_id!r}; there are {', '.join(registry)}")
    patch, installed = registry[name], _versions.find()
    decision = _decide(patch, installed)
    return {
        **_document(patch),
        "installed": installed.host in installed.roots,
        "state": decision.state,
        "reason": decision.reason,
        "selected": _selected(name, registry),
        "bands": [_band(band, decision, installed) for band in patch.bands],
        "untouched": list(patch.untouched),
        "recorded_symbols": {host: len(patch.symbols(host)) for host in _registry.HOSTS},
    }


def catalogue() -> list[dict[str, Any]]:
    """Every patch with its state for the installed versions."""
    installed = _versions.find()
    rows = []
    for patch in _registry.load().values():
        decision = _decide(patch, installed)
        rows.append({**_document(patch), "state": decision.state, "reason": decision.reason})
    return rows


def _decide(patch: Patch, installed: Installed) -> _plan.Decision:
    """The decision; where the host is missing, which alone matters then, it says that."""
    if installed.host in installed.roots:
        return _plan.decide(patch, installed)
    reason = (
        f"{installed.host} is not installed for this interpreter ({sys.executable}), so there is "
        "nothing to look at; ask with the interpreter that it is installed for"
    )
    return _plan.Decision(patch, "skipped", reason)


def applies_to(patch: Patch) -> str:
    """The hosts and releases of a patch, for tables; ranges that meet are one."""
    found: list[str] = []
    for band in patch.bands:
        # A labelled band is for the releases of an earlier one.
        if band.label:
            continue
        name = f"{band.name}{' (retired)' if band.retired else ''}"
        start, _, end = name.partition(",<")
        before, _, until = found[-1].partition(",<") if found else ("", "", "")
        # "1.0 (retired)" and "1.0 on cuda" are no ends that another range begins with.
        devices = f" on {' / '.join(band.devices)}" if band.devices else ""
        meets = until.endswith(devices) and start == f"{band.host} >={until.removesuffix(devices)}"
        if until and not band.retired and meets:
            found[-1] = f"{before},<{end}"
        else:
            found.append(name)
    return "; ".join(found) if found else "recorded only"


def _document(patch: Patch) -> dict[str, Any]:
    fields = ("id", "version", "summary", "why", "upstream", "remove_when")
    return {**{name: getattr(patch, name) for name in fields}, "applies_to": applies_to(patch)}


def _selected(name: str, registry: Mapping[str, Patch]) -> str:
    value = os.environ.get(_selection.VARIABLE)
    if _selection.is_off(value):
        return f"no; {_selection.VARIABLE} is {'unset' if value is None else repr(value)}"
    in_all = tuple(patch.id for patch in registry.values() if patch.available)
    try:
        chosen = _selection.parse(value or "", tuple(registry), in_all)
    except _selection.SelectionError as error:
        return f"no; {error}"
    return f"{'yes' if name in chosen.ids else 'no'}; {_selection.VARIABLE}={value}"


def _band(band: Band, decision: _plan.Decision, installed: Installed) -> dict[str, Any]:
    state, reason = _band_state(band, decision, installed)
    return {
        "name": band.name,
        "releases": list(band.releases),
        "state": state,
        "reason": reason,
        # Where it might apply here, but for its source, its targets are worth reading.
        "in_question": band.host == installed.host
        and installed.host in installed.roots
        and _covers(band, installed)
        and not _comes_too_late(band, decision),
        "targets": [_target(target, band, state, installed) for target in band.targets],
    }


def _band_state(band: Band, decision: _plan.Decision, installed: Installed) -> tuple[str, str]:
    if band.host == installed.host and installed.host not in installed.roots:
        return decision.state, decision.reason
    if band.host != installed.host:
        return "superseded", f"{installed.host} is the active host: {installed.host_reason}"
    if band == decision.band:
        return decision.state, decision.reason
    if not _for_device(band, installed):
        return "skipped", f"the device is {installed.device}: {installed.device_reason}"
    if not _covers(band, installed):
        return "skipped", f"{installed.host_version} is installed"
    if band.retired:
        return "retired", band.retired
    if _comes_too_late(band, decision) and decision.band is not None:
        return "skipped", f"{decision.band.name} comes first, and applies"
    return "skipped", "the installed source differs"


def _comes_too_late(band: Band, decision: _plan.Decision) -> bool:
    """Whether an earlier band for the same releases applies, of which this one is a part."""
    return bool(band.label) and decision.band is not None and band != decision.band


def _covers(band: Band, installed: Installed) -> bool:
    """Whether device and version string leave it open that the band is for this release."""
    final = installed.final_version()
    return _for_device(band, installed) and (
        final is None or not band.versions or SpecifierSet(band.versions).contains(final)
    )


def _for_device(band: Band, installed: Installed) -> bool:
    return not band.devices or installed.device in band.devices


def _target(target: Target, band: Band, state: str, installed: Installed) -> dict[str, Any]:
    reasons: list[str] = []
    root = installed.roots.get(band.host)
    in_question = band.host == installed.host and _covers(band, installed)
    if state == "skipped" and root is not None and in_question:
        found = _records.match(band.host, installed.roots, target.symbols, band.releases)
        reasons = list(found.differences) or ["its own source is as recorded"]
    return {"id": target.id, "seam": target.seam, "state": state, "reasons": reasons}
