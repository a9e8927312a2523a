"""The convolutions and the gated norm compiled for Ascend, and executed on x86 in that form.

No NPU and no CANN is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it
(default: the one that runs the tests). ascend_offline.py says what to install there.
"""

from __future__ import annotations

import ascend_child
import pytest

pytest.importorskip("torch", reason="torch is not installed")

UNIFIED_BUFFER = 192 * 1024

pytestmark = pytest.mark.slow


def rows(*arguments: str, architecture: str = "Ascend910B3") -> dict:
    found = ascend_child.found_by("gdn_conv_ascend.py", *arguments, architecture=architecture)
    return found["rows"]


@pytest.mark.parametrize(
    ("architecture", "part", "count"),
    [
        ("Ascend910B1", "", 82),
        ("Ascend910B3", "channels=8192 width=5 dtype=bfloat16", 4),
        ("Ascend910B4", "channels=8192 width=5 dtype=bfloat16", 4),
        ("Ascend910_9391", "channels=8192 width=5 dtype=bfloat16", 4),
    ],
)
def test_every_case_compiles_and_fits(architecture: str, part: str, count: int) -> None:
    found = rows("compile", part, architecture=architecture)
    print(f"{max(found.values())} of {UNIFIED_BUFFER} bytes at most")
    assert len(found) == count
    # At all of it the compiler has given up its double buffering to fit.
    assert all(0 < used < UNIFIED_BUFFER for used in found.values())


def test_lowered_kernels_execute_on_x86(seed: int) -> None:
    ascend_child.executable_here()
    found = rows("execute", str(seed))
    print(found)
    assert len(found) == 18
    wrong = {case: share for case, share in found.items() if share > 1}
    assert not wrong


def test_hardly_a_byte_is_moved_twice() -> None:
    """A chunk reads what lies before it once more, a program its weights."""
    ascend_child.executable_here()
    found = rows("count")
    assert len(found) == 4
    for case, row in found.items():
        moved = row["read"] + row["written"]
        print(case, moved / row["least"])
        assert row["least"] <= moved < 1.05 * row["least"], case
