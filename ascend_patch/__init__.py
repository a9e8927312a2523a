"""Ascend Patch: small, versioned patches for an installed vLLM, applied as it is imported.

Importing this package imports nothing else: `sitecustomize` does so in every process.
"""

from __future__ import annotations

__version__ = "0.1.0"

# `typing` costs 2 ms at start-up and type checkers accept the plain name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["__version__", "explain", "revert", "status"]


def status() -> dict[str, Any]:
    """What Ascend Patch did in this process.

    Returns:
        The record that this process also writes to its status file: selection, door, host,
        versions, and for each selected patch its state, reason and targets.
    """
    from ascend_patch._runtime import current

    return current().status()


def revert(patch_id: str) -> None:
    """Take one patch back in this process, and leave every other wrapper where it is.

    Args:
        patch_id: For example `rotary` or `patch_rotary`.

    Raises:
        KeyError: There is no such patch; the message names the known ones.
    """
    from ascend_patch._runtime import current

    current().revert(patch_id)


def explain(patch_id: str) -> str:
    """Why a patch applies here or does not, target by target.

    Args:
        patch_id: For example `rotary` or `patch_rotary`.

    Raises:
        KeyError: There is no such patch; the message names the known ones.
    """
    from ascend_patch._explain import explain_text

    return explain_text(patch_id)
