"""The table of releases and patches in docs/releases.md, from the registry and the real sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from _releases import DEVICES, RELEASES, is_branch, root_of

from ascend_patch import _plan, _records, _registry
from ascend_patch._registry import HOSTS, Host
from ascend_patch._versions import Installed

HEAD = """# Releases

Written by `scripts/update_releases` from the registry and the sources of every release; a test
compares. Rows are what pip lists of vLLM and vllm-ascend from 0.11.0 on, and the heads of
vllm-ascend's branches at the commits that are recorded. `tests/drift` derives each cell from the
release's syntax trees as well, without the registry, and holds the two to each other.

- **applied**: the patch has code for this source. `as 0.18.0`: that release is recorded, and all
  that the patch looks at is the same in this one.
- **retired**: the release needs it no more. **skipped**: it has nothing for this release, which
  runs as it was.
- A build whose version is that of no final release is decided by its source: it is applied to where
  it equals a recorded one.
- A newer vLLM than the last row gets the retired ones as retired, and all others skipped until it
  is recorded; a newer vllm-ascend is applied to only where its source is that of a row.

Devices that are not named have what is said without one.
"""
ASCEND = """
## vllm-ascend

On an NPU its classes are what runs; vLLM's own are superseded. Its version decides nothing: a row
is recognised by its source, beside the vLLM of the same version.
"""
VLLM = """
## vLLM

`compiled graphs`: what vLLM names a graph in its cache by, so that patched and unpatched ones are
not taken for each other. *factor* is the digest of the planned patches, as one of the variables
that vLLM hashes; *sources* are the files that were traced, ours among them. Graphs that are
compiled ahead of time (AOT) are named before anything is traced.
"""


@dataclass(frozen=True)
class Cell:
    """One release and patch.

    Attributes:
        text: As the table has it.
        reasons: Why it is not applied, with the devices and state that it is said for.
    """

    text: str
    reasons: tuple[str, ...]


def roots_of(host: Host, release: str) -> dict[Host, Path]:
    roots: dict[Host, Path] = {host: root_of(host, release)}
    if host != "vllm":
        roots["vllm"] = root_of("vllm", _records.below(release))
    return roots


def cell(patch: str, host: Host, release: str, roots: Mapping[Host, Path]) -> Cell:
    """What a patch does on a release, for each device."""
    version = _records.below(release) if is_branch(release) else release
    said: dict[tuple[str, str], list[str]] = {}
    for device in DEVICES[host]:
        installed = Installed({host: version}, roots, host, device=device)
        found = _plan.decide(_registry.load()[patch], installed)
        state, reason = found.state, ""
        if found.state == "armed":
            state = "applied"
            if release not in found.releases:
                state += f" as {nearest(host, release, found.releases)}"
        else:
            reason = in_short(found.reason, f"{host} {version}", device)
        said.setdefault((state, reason), []).append(device)
    states = [(state, devices) for (state, _), devices in said.items()]
    if len({state for state, _ in states}) == 1:
        text = states[0][0]
    else:
        # The state of most devices goes without naming them.
        states.sort(key=lambda one: (one[0].startswith("applied"), -len(one[1])))
        plain = max((state for state, _ in states), key=lambda s: count(s, states))
        named = [f"{state} on {', '.join(d)}" for state, d in states if state != plain]
        text = "; ".join([*reversed(named), plain])
    whole = len(said) == 1
    reasons = tuple(
        f"{state}{'' if whole else ' on ' + ', '.join(devices)}: {reason}"
        for (state, reason), devices in said.items()
        if reason
    )
    return Cell(text, reasons)


def nearest(host: Host, release: str, others: Iterable[str]) -> str:
    """The one of others that stands nearest to a release in the table, the earlier of two."""
    order = RELEASES[host]
    return min(others, key=lambda other: abs(order.index(other) - order.index(release)))


def in_short(reason: str, name: str, device: str) -> str:
    """A reason that releases share: without their names, and without what differs in each."""
    for whole in (f"{name} on {device}", name):
        reason = reason.removeprefix(f"{whole} ") if reason.startswith(whole) else reason
        reason = reason.replace(f"the source of {whole} is none", "its source is none")
    return reason.partition(" it was written for: ")[0] + (
        " it was written for" if " it was written for: " in reason else ""
    )


def count(state: str, states: Iterable[tuple[str, list[str]]]) -> int:
    return sum(len(devices) for other, devices in states if other == state)


def row(host: Host, release: str, compiled: str) -> tuple[str, dict[str, Cell]]:
    """A release's line of the table, and its cells by patch."""
    roots = roots_of(host, release)
    cells = {patch: cell(patch, host, release, roots) for patch in _registry.load()}
    name = release
    if is_branch(release):
        name = f"{release} ({_records.source(host, release)['commit'][:8]})"
    columns = [name, *(one.text for one in cells.values())]
    columns += [compiled] if host == "vllm" else []
    return f"| {' | '.join(columns)} |", cells


def header(host: Host) -> str:
    names = [host.replace("_", "-"), *(f"`{patch}`" for patch in _registry.load())]
    names += ["compiled graphs"] if host == "vllm" else []
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def why(host: Host, cells: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Each reason once, with the releases that have it."""
    lines = []
    for patch in _registry.load():
        having: dict[str, list[str]] = {}
        for release, found in cells.items():
            for reason in found[patch].reasons:
                having.setdefault(reason, []).append(release)
        lines += [
            f"- `{patch}`, {spans(host, releases)}, {reason}" for reason, releases in having.items()
        ]
        lines += [f"  - {text}" for text in untouched(patch, host, having.values())]
    return lines


def untouched(patch: str, host: Host, skipped: Iterable[list[str]]) -> list[str]:
    """What the patch itself says of releases of vllm-ascend that it has nothing for."""
    if host == "vllm":
        return []
    minors = {".".join(_records.below(one).split(".")[:2]) for group in skipped for one in group}
    texts = _registry.load()[patch].untouched
    return [text for text in texts if any(f"{host} {minor}" in text for minor in minors)]


def spans(host: Host, releases: Iterable[str]) -> str:
    """Releases as ranges of the table's rows."""
    order = RELEASES[host]
    places = sorted(order.index(release) for release in releases)
    parts = []
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        names = [order[place] for _, place in run]
        parts.append(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
    return ", ".join(parts)


def document(compiled: Mapping[str, str]) -> str:
    """The whole of docs/releases.md.

    Args:
        compiled: The column on vLLM's compile cache, by release.

    Raises:
        Problem: The source of a release cannot be had.
    """
    parts = [HEAD]
    for host in reversed(HOSTS):
        rows, cells = [], {}
        for release in RELEASES[host]:
            line, cells[release] = row(host, release, compiled.get(release, ""))
            rows.append(line)
        parts.append({"vllm": VLLM, "vllm_ascend": ASCEND}[host])
        reasons = why(host, cells)
        parts.append("\n".join([header(host), *rows]) + "\n")
        parts.append("\nWhy not:\n\n" + "\n".join(reasons) + "\n" if reasons else "")
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)
