"""Operators of the namespace ``ascend_patch``: defined once in a process, whoever imports first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "ascend_patch"
_DISPATCH_KEYS = ("CPU", "CUDA", "PrivateUse1")

_lock = threading.Lock()
# A library that is collected takes its operators along. Survives importlib.reload, which executes
# this file again in the same namespace.
_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})


def define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``ascend_patch::name`` unless it exists; safe from any thread, any number of times.

    ``body`` serves every device; ``fake`` allocates what it returns, without reading memory. A
    module imported afresh (removed from ``sys.modules`` in between) leaves its predecessor's
    operator as it is.
    """
    with _lock:
        if name in _libraries or hasattr(getattr(torch.ops, NAMESPACE), name):
            return
        # torch leaves the class unannotated; Any keeps strict type checking quiet.
        make_library: Any = torch.library.Library
        library = make_library(NAMESPACE, "FRAGMENT")
        # Inductor hands the inputs over with the strides they have in eager mode: slices of qkv
        # stay slices. The tag is newer than the one it falls back to.
        strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, strides))
        for key in _DISPATCH_KEYS:
            library.impl(name, body, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        _libraries[name] = library
