"""Opens the door: arms the finder where ASCEND_PATCHES asks for it.

This and the finder are all that a process pays for that never imports vLLM, so nothing is
imported here beyond what Python has loaded at start-up. The rest of the shim is imported when
vLLM is.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _frozen_importlib import ModuleSpec

    from ascend_patch._finder import Finder

OFF = ("", "none", "0", "off", "false", "no")
HOST_PACKAGES = ("vllm", "vllm_ascend")

# The names of the doors that were opened in this process, in order; the first one armed it.
doors: list[str] = []
_finder: Finder | None = None


def open_door(door: str) -> None:
    """Arm the finder if ASCEND_PATCHES is set; never raise.

    Args:
        door: What called: `sitecustomize`, `pth`, `run`, `plugin`.
    """
    try:
        if os.environ.get("ASCEND_PATCHES", "").strip().lower() in OFF:
            return
        doors.append(door)
        if len(doors) == 1:
            _arm()
    except BaseException as error:
        complain(f"could not be armed ({type(error).__name__}: {error}); vLLM runs as it was")


def finder() -> Finder | None:
    """The armed finder of this process, or None."""
    return _finder


def complain(what: str) -> None:
    """One line on stderr: at this point logging is not configured."""
    if sys.stderr is not None:
        sys.stderr.write(f"ascend-patch: {what}\n")


def _arm() -> None:
    global _finder
    from ascend_patch._finder import Finder, Watch

    _finder = Finder(_callback_failed)
    for package in HOST_PACKAGES:
        _finder.watch(package, Watch(before=_host_is_imported, after=_host_was_imported))
    _finder.arm()


def _host_is_imported(spec: ModuleSpec) -> None:
    from ascend_patch import _runtime

    _runtime.begin(spec)


def _host_was_imported(module: object) -> None:
    # Reached without `_host_is_imported` when vLLM had been imported before the door opened.
    from ascend_patch import _runtime

    _runtime.begin(getattr(module, "__spec__", None))


def _callback_failed(module: str, error: BaseException) -> None:
    complain(f"failed while {module} was imported ({type(error).__name__}: {error})")
    runtime = sys.modules.get("ascend_patch._runtime")
    if runtime is not None:
        runtime.record_internal_error(module, error)
