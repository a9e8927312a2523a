"""The guard at every place where Python or the host enters the shim's own code.

Finders, loaders, callbacks, hooks in vLLM, fork handlers and the status file: what goes wrong
there is reported, and neither Python's start nor the host's import ends. Two things come out all
the same: a refusal that the user asked for, and Ctrl-C.
"""

from __future__ import annotations

import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

MOST_KEPT = 100

# Faults from before the record of this process existed; `_runtime` takes them over.
unrecorded: list[str] = []
_reported: set[str] = set()
_reporting: set[int] = set()


class Refusal(SystemExit):
    """vLLM must not start: the user asked for something that cannot be had, and to be told.

    A SystemExit, so that one sentence is printed and the process ends with status 1.
    """

    # By this attribute and not by its class: tools that unload modules at start-up leave two.
    ascend_patch_fatal = True

    def __init__(self, sentence: str) -> None:
        super().__init__(f"ascend-patch: {sentence}")


def ends_import(error: BaseException) -> bool:
    """Whether an exception goes through the guard: a refusal, or Ctrl-C."""
    # The class is asked, because an instance may answer to any name.
    return (
        issubclass(type(error), KeyboardInterrupt)
        or getattr(type(error), "ascend_patch_fatal", False) is True
    )


def contain(
    during: str,
    function: Callable[..., R],
    *arguments: Any,
    on_error: Callable[[str, BaseException], None] | None = None,
) -> R | None:
    """Call the shim's own code on behalf of the host.

    Args:
        during: What was being done, for the report: `vllm.envs was imported`.
        function: Called with the arguments.
        on_error: Called with (during, exception) instead of `report`.

    Returns:
        What the function returned; None where it failed.

    Raises:
        Refusal: From the function, or from on_error.
        KeyboardInterrupt: Likewise.
    """
    try:
        return function(*arguments)
    except BaseException as error:
        if ends_import(error):
            raise
        try:
            (on_error or report)(during, error)
        except BaseException as another:
            if ends_import(another):
                raise
            # What reports faults has one itself, and there is nobody left to tell.
        return None


def contained(during: str) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """`contain` as a decorator of methods that the host calls, directly or not."""

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                if ends_import(error):
                    raise
                contain(during, report, during, error)
                return None

        guarded.__name__, guarded.__qualname__ = function.__name__, function.__qualname__
        guarded.__doc__, guarded.__module__ = function.__doc__, function.__module__
        vars(guarded)["__wrapped__"] = function
        return guarded

    return decorate


def report(during: str, error: BaseException) -> None:
    """Say once on stderr what was swallowed, and keep it in the record of this process."""
    thread = get_ident()
    if thread in _reporting:
        return  # what reports a fault has one itself
    _reporting.add(thread)
    try:
        sentence = f"while {during}: {describe(error)}"
        if sentence not in _reported and len(_reported) < MOST_KEPT:
            _reported.add(sentence)
            from ascend_patch import _bootstrap

            _bootstrap.complain(f"failed {sentence}")
        runtime = sys.modules.get("ascend_patch._runtime")
        record = getattr(runtime, "record_internal_error", None)
        if record is not None:
            record(during, error)
        elif sentence not in unrecorded and len(unrecorded) < MOST_KEPT:
            unrecorded.append(sentence)
    finally:
        _reporting.discard(thread)


def describe(error: BaseException) -> str:
    """An exception as text, also where its own `__str__` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"{type(error).__name__}, which cannot be printed"
