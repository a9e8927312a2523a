"""What the surface stands for: a torch_npu, a CANN, and how strictly documentation is taken.

The process has one base, set by ``surface.install``; a thread may override it for a while.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from packaging.version import Version

# name -> (on by default, what is allowed though no documentation says so)
ALLOWANCES: dict[str, tuple[bool, str]] = {
    "tnd_head_size": (
        True,
        "fused inference attention takes head size 64 in TND, and 256 for grouped queries with "
        "sparse modes 0 and 3 and blocks of 128, as vllm-ascend uses it",
    ),
    "tnd_float16": (
        True,
        "fused inference attention takes float16 in TND; the documentation of CANN 8.5 names "
        "bfloat16 alone",
    ),
    "strided_kv": (
        True,
        "key and value that are not in a paged cache need not be contiguous, as vllm-ascend passes "
        "slices of the fused projection",
    ),
    "shared_blocks": (
        True,
        "requests may share blocks, so that together they need more blocks than a cache has",
    ),
    "strided_cache": (
        True,
        "caches that are written to may be strided, as a hybrid model's are; ATB's kernels count "
        "slots as if they were contiguous",
    ),
    "absent_blocks": (
        True,
        "npu_gather_pa_kv_cache reads zeros from blocks that there are not, as its own test has it",
    ),
    "other_cos_sin_cache": (
        True,
        "_npu_rotary_embedding turns by the cache it is given; torch_npu's adapter keeps the first "
        "one of the process",
    ),
    "float32": (False, "attention operators take float32 tensors; for tests of exactness"),
}


@dataclass(frozen=True)
class Settings:
    """One way in which operators behave.

    ``release``: of torch_npu; ``cann``: of CANN, such as ``"8.5"``; ``strict``: no allowance but
    those in ``allow``; ``allow`` and ``forbid``: names of ALLOWANCES, over the defaults.
    """

    release: str = "2.9.0"
    cann: str = "8.5"
    strict: bool = False
    allow: frozenset[str] = frozenset()
    forbid: frozenset[str] = frozenset()


class _Override(threading.local):
    value: Settings | None = None


_base = Settings()
_override = _Override()


def current() -> Settings:
    """What holds in this thread."""
    return _override.value or _base


def set_base(value: Settings) -> None:
    """Make ``value`` what holds in every thread that overrides nothing."""
    global _base
    _base = value


def allowed(name: str) -> bool:
    """Is the allowance ``name`` on? Raises KeyError for a name that ALLOWANCES does not have."""
    by_default, _ = ALLOWANCES[name]
    now = current()
    if name in now.forbid:
        return False
    return name in now.allow or (by_default and not now.strict)


def cann_at_least(release: str) -> bool:
    """Does the surface stand for this CANN or a newer one?"""
    return Version(current().cann) >= Version(release)


def torch_npu_at_least(release: str) -> bool:
    """Does the surface stand for this torch_npu or a newer one?"""
    return Version(current().release) >= Version(release)


@contextlib.contextmanager
def settings(
    *,
    release: str | None = None,
    cann: str | None = None,
    strict: bool | None = None,
    allow: Iterable[str] = (),
    forbid: Iterable[str] = (),
) -> Iterator[Settings]:
    """In this thread, and for a while, other settings; what is None stays as it was.

    ``release`` changes which limits hold, not the schemas that are registered. Raises KeyError for
    an allowance that does not exist.
    """
    for name in (*allow, *forbid):
        ALLOWANCES[name]
    before, now = _override.value, current()
    value = replace(
        now,
        release=now.release if release is None else release,
        cann=now.cann if cann is None else cann,
        strict=now.strict if strict is None else strict,
        allow=(now.allow - frozenset(forbid)) | frozenset(allow),
        forbid=(now.forbid - frozenset(allow)) | frozenset(forbid),
    )
    _override.value = value
    try:
        yield value
    finally:
        _override.value = before
