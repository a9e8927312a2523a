"""The runtime of pyACL: the calls of libascendcl by their pyACL names."""

from __future__ import annotations

import ctypes

_runtime = ctypes.CDLL("libascendcl.so")
_runtime.aclrtMemcpy.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)


def memcpy(to: int, room: int, source: int, size: int, kind: int) -> int:
    """Copy `size` bytes between addresses; returns ACL's error code, 0 for none."""
    return int(_runtime.aclrtMemcpy(to, room, source, size, kind))
