"""Operators of npu::, atb:: and _C_ascend that the software NPU adds to kernels/npu_ops."""

from __future__ import annotations

import pytest
from softnpu_checks import names, results

FILE = "checks_semantics.py"


@pytest.mark.parametrize("defect", ["", "swapped_halves", "wrong_scale"])
def test_operators_are_right_unless_they_are_broken(npu, seed, defect):
    found = results(npu, FILE, SEED=str(seed), SOFTNPU_DEFECT=defect)
    assert list(found) == names(FILE)
    failed = {name: one["value"] for name, one in found.items() if not one["passed"]}
    # A control each: the halves of a gated activation swapped, a norm that is 2 % too large.
    wanted = {
        "": set(),
        "swapped_halves": {"activations"},
        "wrong_scale": {"norms_with_a_residual"},
    }
    assert failed.keys() == wanted[defect], "\n\n".join(failed.values())
