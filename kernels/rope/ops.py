"""The operators ``ascend_patch::rotary_embedding`` and ``ascend_patch::rotary_embedding_``.

Importing this module registers them, once in a process. Compiled paths use the functional one: an
in-place operator on slices of qkv is wrapped in clones when a graph is functionalised. The
operators are for inference and have no gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import checks, reference, triton_call

NAMESPACE = "ascend_patch"
OPERATOR = "rotary_embedding"
FUNCTIONAL = f"{NAMESPACE}::rotary_embedding"
IN_PLACE = f"{NAMESPACE}::rotary_embedding_"

_SCHEMAS = {
    FUNCTIONAL: "(Tensor positions, Tensor query, Tensor? key, Tensor cos_sin_cache, "
    "int head_size, bool is_neox_style, int[]? mrope_section, bool mrope_interleaved) "
    "-> (Tensor, Tensor)",
    IN_PLACE: "(Tensor positions, Tensor(a!) query, Tensor(b!)? key, Tensor cos_sin_cache, "
    "int head_size, bool is_neox_style, int[]? mrope_section, bool mrope_interleaved) -> ()",
}
_DISPATCH_KEYS = ("CPU", "CUDA", "PrivateUse1")

dispatch.register(
    OPERATOR,
    dispatch.ANY_DEVICE,
    dispatch.Implementation("reference", reference.rotary_embedding_into),
)
triton_call.register(OPERATOR)


def _functional(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> tuple[Tensor, Tensor]:
    checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)
    out_query, out_key = _fresh_outputs(query, key)
    _run(
        FUNCTIONAL,
        out_query,
        None if key is None else out_key,
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
    )
    return out_query, out_key


def _functional_fake(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> tuple[Tensor, Tensor]:
    checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)
    return _fresh_outputs(query, key)


def _in_place(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> None:
    checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)
    checks.check_in_place(query, key, cos_sin_cache)
    _run(
        IN_PLACE,
        query,
        key,
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
    )


def _in_place_fake(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> None:
    checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)


def _fresh_outputs(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contiguous outputs, whatever the strides of the inputs; [0] stands for an absent key."""
    out_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_shape = (0,) if key is None else key.shape
    return out_query, torch.empty(key_shape, dtype=query.dtype, device=query.device)


def _run(
    operator: str,
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> None:
    arguments = (
        out_query,
        out_key,
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
    )
    choice = dispatch.select(OPERATOR, query.device.type, *arguments)
    if choice.implementation is None:
        raise NotImplementedError(f"{operator} cannot run here: {choice.reason}.")
    choice.implementation.run(*arguments)
    dispatch.observe(operator)


_BODIES = {FUNCTIONAL: (_functional, _functional_fake), IN_PLACE: (_in_place, _in_place_fake)}
_lock = threading.Lock()
# importlib.reload executes this file again in the same namespace: the library, and with it the
# registration, has to survive that.
_library: torch.library.Library | None = globals().get("_library")


def _is_defined(operator: str) -> bool:
    namespace, name = operator.split("::")
    return hasattr(getattr(torch.ops, namespace), name)


def register_operators() -> None:
    """Define both operators unless they exist; safe to call from any thread, any number of times.

    A module imported afresh (removed from ``sys.modules`` in between) finds its predecessor's
    operators and leaves them as they are.
    """
    global _library
    with _lock:
        if _library is not None or _is_defined(FUNCTIONAL):
            return
        # torch leaves the class unannotated; Any keeps strict type checking quiet with any release.
        make_library: Any = torch.library.Library
        library = make_library(NAMESPACE, "FRAGMENT")
        # Inductor hands the inputs over with the strides they have in eager mode: slices of qkv
        # stay slices. The tag is newer than the one it falls back to.
        strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
        tags = (torch.Tag.pt2_compliant_tag, strides)
        for operator, schema in _SCHEMAS.items():
            name = operator.split("::")[1]
            body, fake = _BODIES[operator]
            library.define(name + schema, tags=tags)
            for key in _DISPATCH_KEYS:
                library.impl(name, body, key)
            torch.library.register_fake(operator, fake, lib=library)
        _library = library


register_operators()
