"""The decode kernels compiled for Ascend, and executed on x86 as Ascend lowers them.

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
    found = ascend_child.found_by("gdn_decode_ascend.py", *arguments, architecture=architecture)
    return found["rows"]


@pytest.mark.parametrize(
    ("architecture", "part", "count"),
    [
        ("Ascend910B3", "", 36),
        ("Ascend910B1", "key_size=256 value_size=256", 12),
        ("Ascend910B4", "key_size=256 value_size=256", 12),
        ("Ascend910_9391", "key_size=256 value_size=256", 12),
    ],
)
def test_every_case_compiles_and_fits(architecture: str, part: str, count: int) -> None:
    found = rows("compile", part, architecture=architecture)
    print(f"{max(found.values())} of {UNIFIED_BUFFER} bytes at most")
    assert len(found) == count
    # More than the tile of a state once, as read and as written: both of its buffers are there.
    assert all(0 < bytes_used <= UNIFIED_BUFFER for bytes_used in found.values())
    steps = [used for name, used in found.items() if not name.startswith("gates")]
    assert min(steps) > 4 * 32 * 1024


def test_lowered_kernels_execute_on_x86(seed: int) -> None:
    ascend_child.executable_here()
    found = rows("execute", str(seed))
    print(found)
    assert len(found) == 10
    for case, error in found.items():
        assert error < (2.0**-11 if "float16" in case else 2e-6), case
