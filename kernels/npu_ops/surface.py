"""Puts the CPU semantics behind ``torch.ops.npu`` and ``torch.ops.atb``.

Where torch_npu has been imported, its own schemas stay and its operators get CPU kernels. Where it
has not, the operators are defined from the recorded schemas; import torch_npu first if there is
one, because two libraries cannot define the same operator.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.npu_ops import schemas
from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.settings import ALLOWANCES, Settings, set_base, settings

__all__ = ["FAMILIES", "Call", "Surface", "install", "installed", "kernels", "settings"]

# Each has KERNELS: qualified operator name (with its overload) -> a function whose parameters are
# the schema's arguments, of every release, by name.
FAMILIES = ("fused_infer", "fusion", "paged", "cache", "rotary", "norms")

Function = Callable[..., Any]


def kernels() -> dict[str, Function]:
    """Qualified operator name to its CPU semantics, of every family that is there."""
    found: dict[str, Function] = {}
    for family in FAMILIES:
        name = f"{__package__}.{family}"
        if importlib.util.find_spec(name) is not None:
            found.update(importlib.import_module(name).KERNELS)
    return found


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    ``operator``: its qualified name; ``kwargs``: every argument under its name in the schema, with
    defaults filled in, tensors by reference.
    """

    operator: str
    kwargs: dict[str, Any]


@dataclass
class Surface:
    """What ``install`` did.

    ``names``: the operators that have CPU kernels; ``defined``: those of them, and of the others,
    whose schema is ours because no torch_npu has one; ``calls``: while ``record`` is true, every
    call, in order.
    """

    release: str
    names: frozenset[str] = frozenset()
    defined: frozenset[str] = frozenset()
    record: bool = False
    calls: list[Call] = field(default_factory=list)
    _libraries: list[torch.library.Library] = field(default_factory=list)

    def remove(self) -> None:
        """Take the kernels and the definitions away; harmless where that has happened."""
        global _installed
        with _lock:
            for library in self._libraries:
                library._destroy()
            self._libraries.clear()
            if _installed is self:
                _installed = None
                set_base(Settings())


_lock = threading.RLock()
_installed: Surface | None = None


def installed() -> Surface | None:
    """The surface that is there, if there is one."""
    return _installed


def install(
    release: str = "2.9.0",
    *,
    strict: bool = False,
    cann: str = "8.5",
    allow: Iterable[str] = (),
    record: bool = False,
) -> Surface:
    """Give torch_npu's operators CPU kernels, defining the operators first if nobody has.

    Args:
        release: The torch_npu that the surface stands for. Schemas are those of the nearest
            recorded release that is not newer, or the real torch_npu's where it is imported.
        strict: Take documentation by its word: no allowance that is not in ``allow``.
        cann: The CANN that the surface stands for.
        allow: Names of ``settings.ALLOWANCES`` to switch on.
        record: Note every call in the surface's ``calls``.

    Installing again changes the settings; another release without a real torch_npu defines the
    operators again.

    Raises:
        OperatorError: no schema is recorded for so old a release.
        KeyError: an allowance does not exist.
    """
    global _installed
    allow = frozenset(allow)
    for name in allow:
        ALLOWANCES[name]
    set_to = Settings(release, cann, strict, allow)
    with _lock:
        if _installed is not None and _installed.release != release:
            _installed.remove()
        if _installed is None:
            _installed = _build(release)
        set_base(set_to)
        _installed.record = record
        return _installed


def _build(release: str) -> Surface:
    wanted, functions = schemas.load(release), kernels()
    surface = Surface(release)
    fragments = {ns: torch.library.Library(ns, "FRAGMENT") for ns in ("npu", "atb")}
    surface._libraries.extend(fragments.values())
    defined, names = set(), set()
    try:
        for name, schema in wanted.items():
            namespace, _, rest = schema.partition("::")
            if _live(name) is None:
                fragments[namespace].define(rest)
                defined.add(name)
        # A real torch_npu may have operators that the recorded release lacks.
        for name in {*wanted, *functions}:
            live = _live(name)
            if live is None:
                continue
            namespace, _, rest = name.partition("::")
            kernel = _kernel(surface, name, live, functions.get(name))
            if kernel is not None:
                fragments[namespace].impl(rest, kernel, "CPU")
                names.add(name)
    except BaseException:
        surface.remove()
        raise
    surface.names, surface.defined = frozenset(names), frozenset(defined)
    return surface


def _live(name: str) -> Any:
    """The schema that is registered under a qualified name with its overload, or None."""
    base, _, overload = name.partition(".")
    for schema in torch._C._jit_get_schemas_for_operator(base):
        if schema.overload_name == overload:
            return schema
    return None


def _kernel(surface: Surface, name: str, schema: Any, function: Function | None) -> Function | None:
    short = name.partition("::")[2].partition(".")[0]
    if function is None:

        def missing(*_args: Any, **_kwargs: Any) -> Any:
            raise OperatorError(
                f"{short}: the operator surface has its schema and no CPU semantics; run what "
                "calls it on an NPU, or add it to ascend_patch.kernels.npu_ops"
            )

        return missing
    arguments = [a.name for a in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    beyond = () if takes_all else [name for name in arguments if name not in parameters]
    unknown = {name: defaults.get(name) for name in beyond}

    def call(*args: Any, **kwargs: Any) -> Any:
        dispatch.observe(name)
        given = {**defaults, **dict(zip(arguments, args, strict=False)), **kwargs}
        if surface.record:
            surface.calls.append(Call(name, dict(given)))
        for other, default in unknown.items():
            value = given.pop(other)
            if value is not None and value != default:
                raise OperatorError(
                    f"{short}: {other}={value!r} is not emulated; leave it at its default"
                )
        return function(**given)

    return call
