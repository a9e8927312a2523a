"""Patches as data: what a patch changes, where, and for which releases."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

Host = Literal["vllm", "vllm_ascend"]
Seam = Literal["host", "traced", "operator"]
HOSTS: tuple[Host, ...] = ("vllm", "vllm_ascend")
SEAMS: tuple[Seam, ...] = ("host", "traced", "operator")
# As a target's oracle: the host's own code, ours without its kernels, or no comparison at all.
ORIGINAL, REFERENCE, NOTHING = "original", "reference", "nothing"
ORACLES = ("", ORIGINAL, REFERENCE, NOTHING)


class RegistryError(ValueError):
    """A patch contradicts itself or another one; the message says what to change."""


@dataclass(frozen=True)
class Symbol:
    """A function, method, class or assignment in a module of a host: `module:qualname`."""

    module: str
    qualname: str

    @classmethod
    def parse(cls, text: str) -> Symbol:
        """Read `module:qualname`.

        Raises:
            RegistryError: There is no colon, or one side is empty.
        """
        module, colon, qualname = text.partition(":")
        if not (module and colon and qualname):
            raise RegistryError(f"{text!r} names no symbol; write it as package.module:qualname")
        return cls(module, qualname)

    @property
    def package(self) -> str:
        """The top-level package that holds it; its sources are recorded under that name."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.qualname}"


@dataclass(frozen=True)
class Target:
    """One place that a patch changes.

    Attributes:
        symbol: `module:qualname` of what is replaced; for an operator its implementation.
        seam: `host` (a wrapt wrapper), `traced` (a plain function, because torch.compile walks
            through wrapt's proxies) or `operator` (a registered operator is re-implemented).
        replacement: `module:function` of ours. host: a wrapt wrapper (wrapped, instance, args,
            kwargs). traced and operator: a factory that takes the original and returns ours.
        context: Further symbols that our code relies on; they are fingerprinted with the target.
            A target in vllm_ascend may name symbols of vllm, this one or the target itself: they
            are held to the vLLM release that a release of vllm_ascend has its version from.
        assigned_by: The module that assigns the target last, where that is not its own module.
        assigned_to: `module:qualname` that the host assigns the symbol to, where calls reach it
            there and not by its own name; ours is put there.
        operator: `namespace::name`, for an operator seam.
        dispatch_key: The key whose kernel is replaced, for an operator seam.
        oracle: What ASCEND_PATCHES_VERIFY compares ours with. `original`: the host's own code, the
            default of traced and operator seams. `reference`: ours with the torch references in
            its kernels' place, where the original is wrong. `module:function`: a factory of ours
            that takes the original and returns what is right. `nothing`, the default of host
            seams: for code that must not run twice, because it communicates with other ranks,
            draws random numbers, or writes to what is no argument of it.
        limit: The largest error that VERIFY allows, in machine epsilons of the result's dtype at
            its row's largest element; 0 is the dtype's own (`_compare.LIMITS`).
    """

    symbol: str
    seam: Seam
    replacement: str
    context: tuple[str, ...] = ()
    assigned_by: str = ""
    assigned_to: str = ""
    operator: str = ""
    dispatch_key: str = "PrivateUse1"
    oracle: str = ""
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.seam not in SEAMS:
            raise RegistryError(f"{self.symbol}: seam {self.seam!r} is none of {', '.join(SEAMS)}")
        if (self.seam == "operator") != bool(self.operator):
            raise RegistryError(
                f"{self.symbol}: `operator` goes with the operator seam, and only there"
            )
        if self.operator and not all(self.operator.partition("::")):
            raise RegistryError(f"{self.operator!r} names no operator; write it as namespace::name")
        if self.operator and self.assigned_to:
            raise RegistryError(
                f"{self.symbol}: an operator has a name, and is assigned to nothing"
            )
        named = [] if self.oracle in ORACLES else [self.oracle]
        named += [self.assigned_to] if self.assigned_to else []
        for text in (self.symbol, self.replacement, *self.context, *named):
            Symbol.parse(text)
        if self.limit < 0:
            raise RegistryError(f"{self.symbol}: limit {self.limit} is negative; no error is")

    @property
    def id(self) -> str:
        """The name that state and messages use."""
        return self.operator or self.symbol

    @property
    def module(self) -> str:
        """The module whose end of execution attaches this target."""
        return self.assigned_by or Symbol.parse(self.symbol).module

    @property
    def place(self) -> Symbol:
        """The attribute that is changed."""
        return Symbol.parse(self.assigned_to or self.symbol)

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """Everything that is fingerprinted."""
        return tuple(Symbol.parse(text) for text in (self.symbol, *self.context))


@dataclass(frozen=True)
class Band:
    """Releases of one host that a patch treats alike.

    Attributes:
        host: The library whose classes are patched.
        versions: PEP 440 specifier of the final releases; empty where the version string decides
            nothing (vllm-ascend's branch heads) and the source alone is asked.
        releases: The recorded releases whose source the targets were written against.
        targets: What is changed; empty where the patch is retired.
        retired: Why these releases need the patch no more.
        label: What sets it apart from an earlier band of the same releases, which comes first.
        devices: The devices (of `_devices`) that it is for; empty is any. A retired band
            that names devices and no versions holds for whatever is installed, development
            builds too.
    """

    host: Host
    versions: str
    releases: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    retired: str = ""
    label: str = ""
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.host not in HOSTS:
            raise RegistryError(f"host {self.host!r} is none of {', '.join(HOSTS)}")
        if bool(self.targets) == bool(self.retired):
            raise RegistryError(f"band {self.name}: give either targets or why it is retired")
        if self.targets and not self.releases:
            raise RegistryError(
                f"band {self.name}: targets need the releases they were written for"
            )

    @property
    def name(self) -> str:
        """How lists and messages call it."""
        name = f"{self.host} {self.versions or ' / '.join(self.releases)}".rstrip()
        if self.devices:
            name += f" on {' / '.join(self.devices)}"
        return f"{name}, {self.label}" if self.label else name

    @property
    def whatever_the_release(self) -> bool:
        """Whether the device alone decides: neither versions nor releases are named."""
        return bool(self.devices) and not (self.versions or self.releases)


@dataclass(frozen=True)
class Patch:
    """One patch, which is also its own documentation.

    Attributes:
        id: As ASCEND_PATCHES takes it: `rotary`.
        version: Changes with anything that the patch does; part of vLLM's compile-cache key.
        summary: One line for tables.
        why: What is wrong or slow without it.
        upstream: The change that it ports.
        remove_when: When nobody needs it any more.
        bands: What it does, per host and releases.
        watch: Symbols that are recorded for coming bands, per host.
        untouched: What one might expect it to change and it does not, with the reason.
        requires: Patches that must be applied with it.
        conflicts: Patches that must not be applied with it.
        after: Patches that are applied before it if they are selected.
        self_test: `module:function` of ours: takes a loaded model, yields what `_selftest` runs.
    """

    id: str
    version: str
    summary: str
    why: str
    upstream: str
    remove_when: str
    bands: tuple[Band, ...] = ()
    watch: dict[Host, tuple[str, ...]] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    self_test: str = ""

    def __post_init__(self) -> None:
        if not self.id.isidentifier() or self.id.startswith("patch_") or self.id != self.id.lower():
            raise RegistryError(
                f"patch id {self.id!r}: use a lower-case identifier without `patch_`"
            )
        for name in ("version", "summary", "why", "upstream", "remove_when"):
            if not getattr(self, name):
                raise RegistryError(f"patch {self.id}: {name} is empty")

    @property
    def available(self) -> bool:
        """Whether `all` includes it: it has something to do for at least one release."""
        return any(band.targets for band in self.bands)

    def symbols(self, host: Host) -> tuple[Symbol, ...]:
        """Every symbol of a host whose fingerprint is recorded for this patch."""
        found = {Symbol.parse(text): None for text in self.watch.get(host, ())}
        for band in self.bands:
            for target in band.targets:
                found.update((symbol, None) for symbol in target.symbols if symbol.package == host)
        return tuple(found)


@lru_cache(maxsize=1)
def load() -> dict[str, Patch]:
    """Every patch of `ascend_patch.patches`, in an order that honours `requires` and `after`.

    Raises:
        RegistryError: Two patches share an id, one names a patch that does not exist, or they
            wait for each other.
    """
    package = importlib.import_module("ascend_patch.patches")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    patches: list[Patch] = [
        importlib.import_module(f"{package.__name__}.{name}").PATCH
        for name in names
        if name.startswith("patch_")
    ]
    return order(patches)


def order(patches: list[Patch]) -> dict[str, Patch]:
    """Sort patches so that each comes behind those that it requires or follows.

    Raises:
        RegistryError: See `load`.
    """
    by_id = {patch.id: patch for patch in patches}
    if len(by_id) != len(patches):
        raise RegistryError("two patches share an id; every id is used once")
    placed: dict[str, Patch] = {}

    def place(patch: Patch, waiting: tuple[str, ...]) -> None:
        if patch.id in waiting:
            raise RegistryError(f"patches wait for each other: {' -> '.join((*waiting, patch.id))}")
        for name in (*patch.requires, *patch.after, *patch.conflicts):
            if name not in by_id:
                raise RegistryError(f"patch {patch.id} names {name!r}, which is no patch")
        for name in (*patch.requires, *patch.after):
            place(by_id[name], (*waiting, patch.id))
        placed.setdefault(patch.id, patch)

    for patch in patches:
        place(patch, ())
    return placed
