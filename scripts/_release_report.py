"""What moved between two releases of a host, per target of each patch, for a reviewer to decide."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ascend_patch import _fingerprint, _plan, _records, _registry
from ascend_patch._registry import Host, Patch, Symbol
from ascend_patch._versions import DEVICES, Installed

# A release's recorded symbols: [signature, digest], or null where it has no such symbol.
Symbols = Mapping[str, "list[str] | None"]
QUIET = ("same", "absent in both")


def moved(name: str, new: Symbols, old: Symbols) -> str:
    """A symbol's change in a few words."""
    if name not in old:
        return "not recorded before"
    now, then = new[name], old[name]
    if now == then:
        return "same" if now else "absent in both"
    if now is None or then is None:
        return "gone" if now is None else "new"
    return "signature moved" if now[0] != then[0] else "body changed"


def lines(host: Host, new: Symbols, old: Symbols, before: str) -> Iterator[str]:
    """The report on one release.

    Args:
        new: What the release's record says.
        old: That of the release before it.
        before: The name of that release.
    """
    changes = {name: moved(name, new, old) for name in sorted(new)}
    counts = {word: sum(change == word for change in changes.values()) for word in QUIET}
    others = len(changes) - sum(counts.values())
    yield f"against {before}: {others} moved, " + ", ".join(
        f"{count} {word}" for word, count in counts.items()
    )
    named: set[str] = set()
    for patch in _registry.load().values():
        yield from _of_patch(patch, host, before, changes, new, old, named)
    core = [name for name in _records.CORE[host] if changes.get(name, "same") not in QUIET]
    if core:
        yield "\nthe shim's own hooks:"
        for name in core:
            yield from _one(name, changes, new, old, "  ")


def _of_patch(
    patch: Patch,
    host: Host,
    before: str,
    changes: Mapping[str, str],
    new: Symbols,
    old: Symbols,
    named: set[str],
) -> Iterator[str]:
    """What of a patch's targets moved, then what it only watches."""
    yield f"\n{patch.id}:"
    # A band without a label comes first and names all that a later one of its releases does.
    bands = [band for band in patch.bands if before in band.releases and not band.label]
    targets = {target.id: target for band in bands for target in band.targets}
    if not targets:
        yield f"  no band of it names {before}; of what it watches:"
    for target in targets.values():
        own = [str(symbol) for symbol in target.symbols if str(symbol) in changes]
        wrong = [name for name in own if changes[name] not in QUIET]
        named.update(own)
        yield f"  {'moved' if wrong else 'same '}  {target.id}"
        for name in wrong:
            yield from _one(name, changes, new, old, "           ")
    watched = [str(symbol) for symbol in patch.symbols(host) if str(symbol) in changes]
    rest = [name for name in watched if name not in named and changes[name] not in QUIET]
    named.update(rest)
    if rest and targets:
        yield "  watched:"
    for name in rest:
        yield from _one(name, changes, new, old, "    ")
    if not rest and not targets:
        yield "    nothing moved"


def _one(
    name: str, changes: Mapping[str, str], new: Symbols, old: Symbols, indent: str
) -> Iterator[str]:
    yield f"{indent}{changes[name]}: {name}"
    then, now = old.get(name), new[name]
    if changes[name] == "signature moved" and then and now:
        yield f"{indent}  {then[0]} -> {now[0]}"


def differences(host: Host, symbols: Iterable[Symbol], root: Path, against: Path) -> Iterator[str]:
    """A unified diff of every symbol that differs between two trees, comments and all."""
    for symbol in sorted(symbols, key=str):
        trees = (against, root)
        then, now = (_fingerprint.of_symbol(t, symbol.module, symbol.qualname) for t in trees)
        if then == now or symbol.package != host:
            continue
        old, new = (list(_source_of(tree, symbol)) for tree in trees)
        yield ""
        yield from difflib.unified_diff(old, new, f"old {symbol}", f"new {symbol}", lineterm="")


def _source_of(root: Path, symbol: Symbol) -> Iterator[str]:
    path = _fingerprint.module_file(root, symbol.module)
    if path is not None:
        yield from _fingerprint.text_of(_fingerprint.read_source(path), symbol.qualname)


def decisions(host: Host, release: str, roots: Mapping[Host, Path]) -> Iterator[str]:
    """What each patch does on this source today, per device where devices decide."""
    for patch in _registry.load().values():
        found: dict[tuple[str, str], list[str]] = {}
        for device in DEVICES[1:]:
            installed = Installed({host: release}, roots, host, device=device)
            try:
                one = _plan.decide(patch, installed)
            except _records.RecordError as error:
                one = _plan.Decision(patch, "not decided", str(error))
            reason = one.reason.replace(f" on {device}", "")
            found.setdefault((one.state, reason), []).append(device)
        for (state, reason), devices in found.items():
            where = "" if len(found) == 1 else f" on {', '.join(devices)}"
            yield f"  {patch.id}{where}: {state} ({reason})"
