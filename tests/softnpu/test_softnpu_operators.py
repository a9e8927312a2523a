"""The boxed kernel against CPU results for the operators of PyTorch, with PyTorch's samples."""

from __future__ import annotations

import json
from typing import Any

import pytest
from softnpu_environment import HERE, Environment


def opinfo(
    npu: Environment, samples: int, seed: int, *only: str, **variables: str
) -> dict[str, Any]:
    """Run the samples and return what checks_opinfo.py prints."""
    script = str(HERE / "checks_opinfo.py")
    done = npu.run([script, str(samples), str(seed), *only], seconds=540, **variables)
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


# Others take sizes from tensors: with results that nobody wrote, any amount of memory.
PLAIN = ("add", "sub", "mul", "clamp", "exp", "sqrt", "abs", "tanh", "copysign", "cumsum")


def test_an_argument_that_is_copied_is_found(npu, seed):
    """The control: what is written in place, or into given tensors, is lost."""
    found = opinfo(npu, 2, seed, *PLAIN, SOFTNPU_DEFECT="copied_argument")
    assert found["failed"].keys() >= set(PLAIN)


def test_an_argument_that_keeps_its_size_is_found(npu, seed):
    found = opinfo(npu, 1, seed, *PLAIN, SOFTNPU_DEFECT="lost_resize")
    assert found["failed"].keys() >= set(PLAIN)
