"""The schemas that each release of torch_npu registers, as data; ``scripts/record_op_schemas``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from packaging.version import Version

from ascend_patch.kernels.npu_ops.errors import OperatorError

PATH = Path(__file__).with_name("schemas.json")


@functools.cache
def _recorded() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return data


def releases() -> tuple[str, ...]:
    """The recorded releases of torch_npu, oldest first."""
    return tuple(_recorded()["releases"])


def nearest(release: str) -> str:
    """The newest recorded release that is not newer than ``release``.

    By number, though a post release may have more than the release of the next number. Raises
    OperatorError if all are newer.
    """
    known = [other for other in releases() if Version(other) <= Version(release)]
    if not known:
        raise OperatorError(
            f"torch_npu {release}: the oldest recorded schemas are those of {releases()[0]}; "
            "use that release or a newer one"
        )
    return known[-1]


def load(release: str) -> dict[str, str]:
    """Qualified operator name, such as ``npu::npu_rms_norm``, to its schema in that release.

    An overload is part of the name: ``npu::npu_fused_infer_attention_score.out``. Operators that
    the release does not have are left out. Raises OperatorError as ``nearest``.
    """
    chosen = nearest(release)
    place = releases().index(chosen)
    found: dict[str, str] = {}
    for name, history in _recorded()["operators"].items():
        schema = None
        for since, text in history:
            if releases().index(since) <= place:
                schema = text
        if schema is not None:
            found[name] = schema
    return found
