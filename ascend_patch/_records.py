"""What each recorded release of a host looks like, and which of them an installed source equals.

`scripts/record_release` writes the data: per release a flat map from `module:qualname` to
[signature, digest], or to null where the release has no such symbol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from ascend_patch import _fingerprint, _registry
from ascend_patch._fingerprint import Fingerprint
from ascend_patch._registry import Host, Symbol

# What the shim itself hooks, whichever patches there are.
CORE: dict[Host, tuple[str, ...]] = {
    "vllm": (
        "vllm.envs:compile_factors",
        "vllm.envs:compute_hash",
        "vllm.envs:environment_variables",
        "vllm.executor.ray_distributed_executor:RayDistributedExecutor._init_workers_ray",
        "vllm.model_executor.model_loader:get_model_loader",
        "vllm.plugins:load_general_plugins",
        "vllm.v1.executor.ray_executor:RayDistributedExecutor._init_workers_ray",
        "vllm.v1.executor.ray_executor_v2:RayExecutorV2._build_runtime_env",
    ),
    "vllm_ascend": (),
}


class RecordError(RuntimeError):
    """The recorded data cannot be used; the message says what to run."""


@dataclass(frozen=True)
class Match:
    """How an installed source compares with recorded releases.

    Attributes:
        agreeing: Releases that equal it in every symbol that was asked for, oldest first.
        nearest: The release with the fewest differences, the later one on ties; empty where there
            was none to compare with.
        differences: What differs from the nearest release, one sentence each; empty if it agrees.
    """

    agreeing: tuple[str, ...]
    nearest: str
    differences: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.agreeing)


def release_order(release: str) -> tuple[tuple[int, ...], bool, str]:
    """A sort key: by version, and a branch head behind the final release it continues.

    `packaging` cannot order these: branches are recorded by name (`releases/v0.18.0`).
    """
    numbers = tuple(map(int, re.findall(r"\d+", release)))
    return numbers, not release[:1].isdigit(), release


def releases(host: Host) -> tuple[str, ...]:
    """The recorded releases of a host, oldest first."""
    return tuple(sorted(_data(host), key=release_order))


def source(host: Host, release: str) -> dict[str, str]:
    """Where a release's record comes from: kind, name, and for a tree its commit."""
    return dict(_release(host, release)["source"])


def fingerprint(host: Host, release: str, symbol: Symbol) -> Fingerprint | None:
    """The recorded fingerprint of a symbol, or None where the release has no such symbol.

    Raises:
        RecordError: The release, or this symbol of it, was never recorded.
    """
    symbols = _release(host, release)["symbols"]
    if str(symbol) not in symbols:
        raise RecordError(
            f"{symbol} is not recorded for {host} {release}; run scripts/record_release {host} "
            f"{release}"
        )
    entry = symbols[str(symbol)]
    return None if entry is None else Fingerprint(*entry)


def symbols(host: Host) -> tuple[Symbol, ...]:
    """Every symbol of a host that is recorded: those of all patches, and the shim's own."""
    found = {Symbol.parse(text) for text in CORE[host]}
    for patch in _registry.load().values():
        found.update(patch.symbols(host))
    return tuple(sorted(found, key=str))


def below(release: str) -> str:
    """The vLLM release that a release or branch head of vllm-ascend is written for.

    They share their version: vllm-ascend 0.18.0 and its branch releases/v0.18.0 need vLLM 0.18.0,
    and so does a post release of it.
    """
    return ".".join(map(str, release_order(release.partition(".post")[0])[0]))


def match(
    host: Host,
    package_roots: Mapping[Host, Path],
    symbols: Iterable[Symbol],
    releases: Sequence[str],
) -> Match:
    """Compare an installed source with recorded releases. Only `.py` files are read.

    Args:
        host: The library.
        package_roots: The folders that hold top-level packages: the host's, and vLLM's where a
            symbol of vLLM is among those of another host.
        symbols: What has to be equal.
        releases: The recorded releases to compare with.

    Raises:
        RecordError: One of the releases was never recorded.
    """
    installed = {symbol: _installed(package_roots, symbol) for symbol in dict.fromkeys(symbols)}
    compared = {
        release: tuple(
            sentence
            for symbol, found in installed.items()
            for sentence in _differences(host, release, symbol, found)
        )
        for release in sorted(releases, key=release_order)
    }
    if not compared:
        return Match((), "", ())
    # min() keeps the first of equals: the latest release comes first.
    nearest = min(reversed(compared), key=lambda release: len(compared[release]))
    agreeing = tuple(release for release, found in compared.items() if not found)
    return Match(agreeing, nearest, compared[nearest])


def forget() -> None:
    """Read the data again when it is asked for; somebody has written it."""
    _data.cache_clear()


def _installed(package_roots: Mapping[Host, Path], symbol: Symbol) -> Fingerprint | str | None:
    """The fingerprint of an installed symbol, or why its source cannot be read."""
    package_root = package_roots.get(cast(Host, symbol.package))
    if package_root is None:
        return f"the sources of {symbol.package} were not found"
    try:
        return _fingerprint.of_symbol(package_root, symbol.module, symbol.qualname)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return f"the source of {symbol.module} cannot be read ({type(error).__name__}: {error})"


def _differences(
    host: Host, release: str, symbol: Symbol, found: Fingerprint | str | None
) -> tuple[str, ...]:
    """Sentences on how one installed symbol differs from one release's record."""
    if isinstance(found, str):
        return (f"{symbol.qualname}: {found}",)
    _release(host, release)  # one that was never recorded is an error
    named = release
    if symbol.package != host:
        host, release = cast(Host, symbol.package), below(release)
        named = f"{host} {release}"
    try:
        recorded = fingerprint(host, release, symbol)
    except RecordError as error:
        return (str(error),)
    if found == recorded:
        return ()
    if found is None:
        return (f"{symbol.qualname} is not there ({symbol.module}); {named} has it",)
    if recorded is None:
        return (f"{symbol.qualname} is there ({symbol.module}); {named} has no such symbol",)
    if found.signature != recorded.signature:
        return (
            f"{symbol.qualname}: its parameters are {found.signature}, recorded for {named} "
            f"{recorded.signature}",
        )
    return (f"{symbol.qualname}: its body differs from {named}",)


def _release(host: Host, release: str) -> dict[str, Any]:
    data = _data(host)
    if release not in data:
        raise RecordError(
            f"{host} {release} is not recorded (recorded: {', '.join(releases(host)) or 'none'}); "
            f"run scripts/record_release {host} {release}"
        )
    found: dict[str, Any] = data[release]
    return found


@lru_cache(maxsize=2)
def _data(host: Host) -> dict[str, dict[str, Any]]:
    """The data file of a host. Read as a resource, so that a zipped package works."""
    file = resources.files("ascend_patch") / "data" / f"{host}.json"
    try:
        data: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecordError(
            f"ascend_patch/data/{host}.json is damaged ({error}); install ascend-patch again"
        ) from error
    return data
