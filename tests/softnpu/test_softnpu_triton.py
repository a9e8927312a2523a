"""Triton for Ascend on the software NPU: the release's kernels, interpreted, on npu memory."""

from __future__ import annotations

from softnpu_checks import names, results

FILE = "checks_triton.py"
WIDE = "rope_of_192_dimensions"
LIMITS = {"torch.float32": 5e-7, "torch.bfloat16": 1.6e-2}


def run(npu, seed, *only: str, **variables: str) -> dict:
    """Run the checks and return their values; all have to pass."""
    found = results(npu, FILE, *only, SEED=str(seed), SOFTNPU_TRITON="1", **variables)
    failed = {name: one["value"] for name, one in found.items() if not one["passed"]}
    assert not failed, "\n\n".join(f"{name}: {value}" for name, value in failed.items())
    return {name: one["value"] for name, one in found.items()}


def test_kernels_of_the_release_run_and_rope_is_wrong_in_192_dimensions(npu, seed):
    found = run(npu, seed)
    assert list(found) == names(FILE)
    print(found["rope_of_the_release"], found[WIDE])
    # The kernel of 0.18.0 takes sines from where the next power of two would have them.
    assert min(found[WIDE].values()) > 0.5


def test_with_the_shim_rope_is_right_in_192_dimensions(npu, seed):
    found = run(npu, seed, "rope_of_the_release", WIDE, ASCEND_PATCHES="rotary")
    print(found)
    for dtype, limit in LIMITS.items():
        assert found[WIDE][dtype] <= limit


def test_without_the_switch_there_is_no_triton(npu):
    """What the everyday servers run: vllm-ascend's branches without Triton."""
    code = "import torch, torch_npu; from vllm.triton_utils import HAS_TRITON; print(HAS_TRITON)"
    said = [
        npu.run(["-c", code], seconds=120, SOFTNPU_TRITON=value).stdout.split()[-1]
        for value in ("", "1")
    ]
    assert said == ["False", "True"]
