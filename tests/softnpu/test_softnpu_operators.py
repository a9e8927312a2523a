"""The boxed kernel against CPU results for the operators of PyTorch, with PyTorch's samples."""

from __future__ import annotations

import json
from typing import Any

import pytest
from softnpu_environment import HERE, Environment


def opinfo(npu: Environment, samples: int, seed: int, **variables: str) -> dict[str, Any]:
    """Run the samples and return what checks_opinfo.py prints."""
    script = str(HERE / "checks_opinfo.py")
    done = npu.run([script, str(samples), str(seed)], seconds=540, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{found['operators']} operators, {found['counts']}, {len(found['failed'])} failed, "
        f"in {found['seconds']} s; not checked: {found['unchecked']}"
    )
    return found


@pytest.mark.parametrize("samples", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_operators_give_cpu_results(npu, seed, samples):
    found = opinfo(npu, samples, seed)
    assert not found["failed"], "\n\n".join(f"{k}: {v}" for k, v in found["failed"].items())
    # Nothing may drop out of the comparison unseen.
    assert found["operators"] >= 670
    counts = found["counts"]
    assert counts["forward"] > 1200
    assert counts["strided"] > 1100
    assert counts["out"] > 550
    assert counts["in place"] > 220


@pytest.mark.parametrize(
    ("defect", "least"), [("copied_argument", 50), ("lost_resize", 200)], ids=lambda x: str(x)
)
@pytest.mark.slow
def test_a_defect_of_the_kernel_is_found(npu, seed, defect, least):
    """The control: an argument that is a copy, and a resized argument that stays as it was."""
    found = opinfo(npu, 1, seed, SOFTNPU_DEFECT=defect)
    assert len(found["failed"]) >= least
