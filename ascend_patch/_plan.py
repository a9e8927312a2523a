"""Decides, before anything of the host is imported, what each selected patch will do here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from packaging.specifiers import SpecifierSet

from ascend_patch import __version__, _records
from ascend_patch._guard import describe
from ascend_patch._registry import Band, Patch
from ascend_patch._selection import Selection
from ascend_patch._versions import Installed

MAX_DIFFERENCES = 3


@dataclass(frozen=True)
class Decision:
    """What one patch will do.

    Attributes:
        state: `armed` (will apply as its modules are imported), `retired`, `superseded`,
            `skipped` or `failed`.
        reason: Why, as a sentence.
        band: The band that matched, where one did.
        releases: The recorded releases whose source is the installed one.
    """

    patch: Patch
    state: str
    reason: str
    band: Band | None = None
    releases: tuple[str, ...] = ()


def plan(
    selection: Selection, registry: Mapping[str, Patch], installed: Installed
) -> dict[str, Decision]:
    """Decide every selected patch, in the registry's order."""
    decisions: dict[str, Decision] = {}
    for name in registry:
        if name in selection.ids:
            decision = _decide_safely(registry[name], installed)
            decisions[name] = _with_others(decision, decisions, selection)
    return decisions


def _decide_safely(patch: Patch, installed: Installed) -> Decision:
    """A fault in what one patch declares fails that patch, and no other."""
    try:
        return decide(patch, installed)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Decision(patch, "failed", f"it could not be decided: {describe(error)}")


def decide(patch: Patch, installed: Installed) -> Decision:
    """What a patch would do here if it were selected alone."""
    if not patch.bands:
        return Decision(
            patch,
            "skipped",
            f"ascend-patch {__version__} has no code for it yet; it only records its sources",
        )
    bands = [band for band in patch.bands if band.host == installed.host]
    host = f"{installed.host} {installed.host_version}"
    if not bands:
        others = ", ".join(sorted({band.host for band in patch.bands}))
        return Decision(
            patch,
            "superseded",
            f"{installed.host} is the active host and this patch has targets in {others} only",
        )
    everywhere = bands
    if any(band.devices for band in bands):
        host += f" on {installed.device}"
        named = "; ".join(band.name for band in bands)
        bands = [b for b in bands if not b.devices or installed.device in b.devices]
        if not bands:
            return Decision(patch, "skipped", f"{host} is nothing that it is written for ({named})")
    final = installed.final_version()
    if final is not None:
        ranges = ", ".join(dict.fromkeys(band.versions for band in bands if band.versions))
        bands = [b for b in bands if not b.versions or SpecifierSet(b.versions).contains(final)]
        if not bands:
            reason = f"{host} is outside of the releases it is written for ({ranges})"
            elsewhere = dict.fromkeys(
                device
                for band in everywhere
                if band.targets and SpecifierSet(band.versions).contains(final)
                for device in band.devices
            )
            if elsewhere:
                reason += f"; this release has it on {', '.join(elsewhere)}"
            return Decision(patch, "skipped", reason)
    for band in bands:
        if band.retired and (final is not None or band.whatever_the_release):
            return Decision(patch, "retired", band.retired, band)
    root = installed.roots.get(installed.host)
    if root is None:
        return Decision(
            patch, "skipped", f"the sources of {host} were not found, so it cannot be recognised"
        )
    differences: tuple[str, ...] = ()
    for band in bands:
        if not band.targets:
            continue
        symbols = tuple({symbol: None for target in band.targets for symbol in target.symbols})
        match = _records.match(band.host, installed.roots, symbols, band.releases)
        if match:
            return Decision(
                patch,
                "armed",
                f"the source is that of {band.host} {' and '.join(match.agreeing)}",
                band,
                match.agreeing,
            )
        if not differences or len(match.differences) < len(differences):
            differences = match.differences
    if not differences:
        return Decision(
            patch,
            "skipped",
            f"{host} is no final release, and those that need the patch no more are not "
            "recognised by their source",
        )
    shown = "; ".join(differences[:MAX_DIFFERENCES])
    more = (
        f"; and {len(differences) - MAX_DIFFERENCES} more"
        if len(differences) > MAX_DIFFERENCES
        else ""
    )
    return Decision(
        patch, "skipped", f"the source of {host} is none that it was written for: {shown}{more}"
    )


def digest(decisions: Mapping[str, Decision], device: str) -> str:
    """A digest of everything that changes what a compiled graph computes; empty if nothing does.

    It is that of the planned patches and not of the applied ones: modules are imported lazily,
    and every rank must come to the same answer.
    """
    planned = [
        (name, d.patch.version, d.band.name, d.releases)
        for name, d in sorted(decisions.items())
        if d.state == "armed" and d.band is not None
    ]
    if not planned:
        return ""
    text = json.dumps([__version__, device, planned])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _with_others(
    decision: Decision, earlier: Mapping[str, Decision], selection: Selection
) -> Decision:
    if decision.state != "armed":
        return decision
    for name in decision.patch.requires:
        if name not in selection.ids:
            return replace(
                decision, state="skipped", reason=f"it needs patch {name}, which is not selected"
            )
        if earlier[name].state not in ("armed", "retired"):
            return replace(
                decision,
                state="skipped",
                reason=f"it needs patch {name}, which is {earlier[name].state}",
            )
    for name, other in earlier.items():
        if other.state == "armed" and (
            name in decision.patch.conflicts or decision.patch.id in other.patch.conflicts
        ):
            return replace(
                decision,
                state="skipped",
                reason=f"it conflicts with patch {name}, which comes first",
            )
    return decision
