"""Opens the door: arms the finder where ASCEND_PATCHES asks for it.

This and the finder are all that a process pays for that never imports vLLM, so nothing is
imported here beyond what Python has loaded at start-up. The rest of the shim is imported when
vLLM is.
"""

from __future__ import annotations

import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _frozen_importlib import ModuleSpec

    from ascend_patch._finder import Finder

VARIABLE = "ASCEND_PATCHES"
OFF = ("", "none", "0", "off", "false", "no")
HOST_PACKAGES = ("vllm", "vllm_ascend")

# The doors that were opened in this process, each once, in order; the first one armed it.
doors: list[str] = []
# Where another copy of this package lies whose sitecustomize ran too: two versions may be mixed.
other_copies: list[str] = []
_finder: Finder | None = None
_value = ""
_complaint = ""


def open_door(door: str, place: str = "") -> None:
    """Arm the finder if ASCEND_PATCHES is set; never break what called.

    The .pth files of older installs import this name from this module, and a checkout is updated
    without them: whatever moves, `ascend_patch._bootstrap.open_door("pth")` has to activate.

    Args:
        door: What called: `sitecustomize`, `pth`, `plugin`.
        place: The folder that holds the package which the sitecustomize that called came with.

    Raises:
        Refusal: vLLM had been imported already, and the user asked for it to be refused.
    """
    try:
        if _is_off(os.environ.get(VARIABLE, "")):
            return
        _remember(door, place)
        if finder() is None:
            _arm()
        else:
            _arm_again()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or getattr(error, "ascend_patch_fatal", False):
            raise
        if finder() is None:
            doors.clear()
        _complain_once(f"could not be armed ({type(error).__name__}: {error}); vLLM runs as it was")


def finder() -> Finder | None:
    """The armed finder of this process, or None."""
    if _finder is not None:
        return _finder
    # Tools that unload every module at start-up (ddtrace, for gevent) leave sys.meta_path alone.
    for other in sys.meta_path:
        if type(other).__module__ == "ascend_patch._finder":
            return other  # type: ignore[return-value]
    return None


def value() -> str:
    """What ASCEND_PATCHES says; where it is gone, what it said when the door opened.

    A sitecustomize that empties os.environ does not mean us. `none` does.
    """
    return os.environ.get(VARIABLE, _value)


def complain(what: str) -> None:
    """One line on stderr: at this point logging is not configured."""
    line = f"ascend-patch: {what}\n"
    stream = sys.stderr
    try:
        if type(stream) is io.TextIOWrapper:
            stream.flush()
            # Past its buffer: what a full disk or a closed pipe does not take would stay in there,
            # and Python, which flushes it at the end, would turn exit status 0 into 120.
            _write_all(stream.fileno(), line.encode(stream.encoding, "backslashreplace"))
        else:
            stream.write(line)
    except (AttributeError, OSError, ValueError, LookupError):
        # No stderr, or a closed, full or broken one: pythonw, daemons.
        return


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _complain_once(what: str) -> None:
    # Each door that comes fails for the same reason.
    global _complaint
    if what != _complaint:
        _complaint = what
        complain(what)


def _is_off(text: str) -> bool:
    return text.strip().lower() in OFF


def _remember(door: str, place: str) -> None:
    global _value
    _value = os.environ[VARIABLE]
    if door not in doors:
        doors.append(door)
    if place:
        package = os.path.realpath(os.path.join(place, "ascend_patch"))
        if package != os.path.realpath(os.path.dirname(__file__)) and package not in other_copies:
            other_copies.append(package)


def _arm() -> None:
    global _finder
    from ascend_patch._finder import Finder, Watch

    _finder = Finder(_callback_failed)
    try:
        for package in HOST_PACKAGES:
            _finder.watch(package, Watch(before=_host_is_imported, after=_host_was_imported))
        _finder.arm()
    except Exception:
        _finder = None
        raise


def _arm_again() -> None:
    """A later door: put back what somebody has taken out of sys.meta_path since the first one."""
    armed = finder()
    if armed is None:
        return
    armed.arm()
    for package in HOST_PACKAGES:
        host = sys.modules.get(package)
        spec = getattr(host, "__spec__", None)
        if host is not None and not getattr(spec, "_initializing", False):
            _host_was_imported(host)


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
        runtime.record_internal_error(f"{module} was imported", error)
