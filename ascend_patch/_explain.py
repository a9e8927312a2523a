"""Why a patch applies here or not, target by target; and what there is at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    found = explain(patch_id)
    lines = [
        f"{found['id']} (version {found['version']}): {found['summary']}",
        f"  why          {found['why']}",
        f"  upstream     {found['upstream']}",
        f"  remove when  {found['remove_when']}",
        f"  here         {found['state']}: {found['reason']}",
        f"  selected     {found['selected']}",
    ]
    for band in found["bands"]:
        lines.append(f"  {band['name']}: {band['state']}: {band['reason']}")
        for target in band["targets"]:
            lines.append(f"    {target['state']:<11} {target['id']} ({target['seam']} seam)")
            lines.extend(f"                {sentence}" for sentence in target["reasons"])
    if found["untouched"]:
        lines.append("  left as it is:")
        lines.extend(f"    {sentence}" for sentence in found["untouched"])
    return "\n".join(lines)


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
    decision = _plan.decide(patch, installed)
    return {
        **_document(patch),
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
        decision = _plan.decide(patch, installed)
        rows.append({**_document(patch), "state": decision.state, "reason": decision.reason})
    return rows


def applies_to(patch: Patch) -> str:
    """The hosts and releases of a patch, for tables."""
    found = [f"{b.name}{' (retired)' if b.retired else ''}" for b in patch.bands]
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
        "targets": [_target(target, band, state, installed) for target in band.targets],
    }


def _band_state(band: Band, decision: _plan.Decision, installed: Installed) -> tuple[str, str]:
    if band.host != installed.host:
        return "superseded", f"{installed.host} is the active host: {installed.host_reason}"
    if band == decision.band:
        return decision.state, decision.reason
    final = installed.final_version()
    if final is not None and band.versions and not SpecifierSet(band.versions).contains(final):
        return "skipped", f"{installed.host_version} is installed"
    if band.retired:
        return "retired", band.retired
    return "skipped", "the installed source differs"


def _target(target: Target, band: Band, state: str, installed: Installed) -> dict[str, Any]:
    reasons: list[str] = []
    root = installed.roots.get(band.host)
    if state == "skipped" and root is not None and band.host == installed.host:
        found = _records.match(band.host, root, target.symbols, band.releases)
        reasons = list(found.differences) or ["its own source is as recorded"]
    return {"id": target.id, "seam": target.seam, "state": state, "reasons": reasons}
