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
    from typing import Any

    from ascend_patch._finder import Finder

# ASCEND_PATCHES_STRICT holds where a file of the shim is missing or broken, these two included.
_fault: BaseException | None = None
try:
    from ascend_patch import _env, _guard
except KeyboardInterrupt:
    raise
except BaseException as error:
    _fault = error

VARIABLE = "ASCEND_PATCHES"
# As `_env.NOT_ACTIVATED`.
OFF = ("", "none", "0", "off", "false", "no")
STRICT = "ASCEND_PATCHES_STRICT"
HOST_PACKAGES = ("vllm", "vllm_ascend")

# The doors that were opened in this process, each once, in order; the first one armed it.
doors: list[str] = []
# Where another copy of this package lies whose sitecustomize ran too: two versions may be mixed.
other_copies: list[str] = []
_finder: Finder | None = None
_complaint = ""
# For where ASCEND_PATCHES_STRICT cannot be read any more, as at the end of the stack.
_strict_at_activation = False


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
        if value().strip().lower() in OFF:
            return
        if _fault is not None:
            raise _fault
        _remember(door, place)
        if finder() is None:
            _arm()
        else:
            _arm_again()
    except BaseException as error:
        if _fault is None and _guard.ends_import(error):
            raise
        reason = f"could not be armed ({_describe(error)})"
        if finder() is None:
            doors.clear()
            _close_if_strict(reason)
        _complain_once(f"{reason}; vLLM runs as it was")


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
    return os.environ.get(VARIABLE, "") if _fault is not None else _env.get(VARIABLE)


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
    except KeyboardInterrupt:
        raise
    except BaseException:
        # No stderr, a closed, full or broken one (pythonw, daemons), or an object that raises
        # anything at all.
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


def _remember(door: str, place: str) -> None:
    global _strict_at_activation
    _env.remember()
    _strict_at_activation = _is_strict()[0]
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
            _finder.watch(package, Watch(before=_decide, after=_host_was_imported))
        _finder.arm()
    except BaseException:
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


def _decide(spec: object) -> None:
    try:
        from ascend_patch import _runtime

        _runtime.begin(spec)
    except BaseException as error:
        if not _guard.ends_import(error):
            _refuse_undecided(f"the shim itself failed ({_describe(error)})")
        raise


def _host_was_imported(module: object) -> None:
    # Reached without a decision before it when vLLM had been imported before the door opened.
    _decide(getattr(module, "__spec__", None))


def _callback_failed(module: str, error: BaseException) -> None:
    if module.partition(".")[0] in HOST_PACKAGES:
        _refuse_undecided(f"the shim failed while {module} was imported ({_describe(error)})")
    _guard.report(f"{module} was imported", error)


def _describe(error: BaseException) -> str:
    return type(error).__name__ if _fault is not None else _guard.describe(error)


def _refuse_undecided(reason: str) -> None:
    """With STRICT nothing of the host is imported before it is known what is patched.

    Raises:
        Refusal: ASCEND_PATCHES_STRICT is on, or cannot be read, and nothing was decided yet.
    """
    current = getattr(sys.modules.get("ascend_patch._runtime"), "current", None)
    is_decided = getattr(current and current(), "is_decided", None)
    if is_decided is not None and is_decided():
        return
    strict, sentence = _is_strict()
    if strict:
        raise _guard.Refusal(sentence or f"{STRICT}=1 and {reason}") from None


def _is_strict() -> tuple[bool, str]:
    """Whether STRICT is on, and what is wrong with its value: the shim's own rest is not needed."""
    if _fault is not None:
        return os.environ.get(STRICT, "").strip().lower() not in OFF, ""
    try:
        return _env.switch(STRICT), ""
    except _env.SettingError as error:
        return True, str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return _strict_at_activation, ""


def _close_if_strict(reason: str) -> None:
    """Where the finder cannot be armed and STRICT is on, no host may be imported.

    Raises:
        Refusal: One has been imported already.
    """
    strict, sentence = _is_strict()
    if not strict:
        return
    closed = _Closed(sentence or f"{STRICT}=1 and the shim {reason}")
    if any(package in sys.modules for package in HOST_PACKAGES):
        raise closed.refusal()
    if not any(type(other) is _Closed for other in sys.meta_path):
        sys.meta_path.insert(0, closed)


class _Closed:
    """A finder and loader in the place of those that cannot be imported: refuses the hosts."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self._searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in HOST_PACKAGES or self._searching:
            return None
        self._searching = True
        try:
            # A probe for a host that is not installed finds nothing, as without the shim.
            others = [other for other in sys.meta_path if other is not self]
            found = (o.find_spec(fullname, path, target) for o in others if hasattr(o, "find_spec"))
            spec: Any = next((spec for spec in found if spec is not None), None)
        finally:
            self._searching = False
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: object) -> None:
        raise self.refusal()

    def exec_module(self, module: object) -> None:
        raise self.refusal()

    def refusal(self) -> SystemExit:
        if _fault is not None:
            return SystemExit(f"ascend-patch: {self.sentence}")
        return _guard.Refusal(self.sentence)
