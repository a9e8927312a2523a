"""The one error of the operator surface."""

from __future__ import annotations


class OperatorError(RuntimeError):
    """A call that an NPU's operator would refuse, or that its documentation rules out.

    The message begins with the operator's name and speaks in the operator's own terms.
    """


def require(condition: bool, operator: str, sentence: str) -> None:
    """Raise OperatorError("operator: sentence") unless ``condition``.

    The sentence is built by the caller, whether it is needed or not: keep costly ones behind an
    ``if``.
    """
    if not condition:
        raise OperatorError(f"{operator}: {sentence}")
