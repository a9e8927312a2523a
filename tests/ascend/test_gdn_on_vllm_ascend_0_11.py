"""The chunked rule of vllm_ascend 0.11.0, by the name under which its layer has it.

Against the recurrence in float64. The layer calls it for one sequence at a time, and reads where
that begins and ends from the device; that is left as it is.
"""

from __future__ import annotations

import functools

import pytest
from ascend_gdn_runs import run

pytestmark = pytest.mark.slow

RULE = """
import types
from triton.runtime import driver
# Its decorators ask the one device there is for a clock; nothing is launched.
driver.set_active(types.SimpleNamespace(get_benchmarker=lambda: None))
import vllm_ascend.patch.worker
import vllm_ascend.models.qwen3_next as layer
import gdn_judge, gdn_oracle
torch.set_num_threads(1)

def rule(**given):
    'As `_forward` calls it: one sequence, and what it returns.'
    assert given.pop("state_layout") == "KV"
    given.pop("cu_seqlens")
    out = given.pop("out")
    q, k, v = (given.pop(name) for name in "qkv")
    found, final = layer.chunk_gated_delta_rule(
        query=q, key=k, value=v, output_final_state=True, **given
    )
    out.copy_(found)
    return out, final

found = {}
for heads in (2, 4, 6):
    for length in (1, 63, 64, 65, 200):
        case = gdn_oracle.Case((length,), value_heads=heads, layout="KV", sliced=True)
        try:
            found[f"{heads} {length}"] = gdn_judge.judge(case, SEED, run=rule)
        except Exception as fault:
            found[f"{heads} {length}"] = f"{type(fault).__name__}: {fault}"
print(json.dumps([found, patch()]))
"""
RIGHT = 1e-4


@functools.cache
def found(patches: str) -> dict:
    # No device is in sight yet, for which vLLM keeps Triton.
    results, state = run("0.11.0", RULE, patches=patches, CUDA_VISIBLE_DEVICES="")
    print(state)
    if patches != "none":
        assert state["state"] == "applied", state
        assert state["targets"][0]["calls"] == len(results)
    return results


def test_ours_is_reached_by_the_layer_s_name_and_right_for_any_number_of_heads():
    for name, errors in found("gdn_attn").items():
        assert max(errors) < RIGHT, (name, errors)


def test_the_release_s_own_takes_value_heads_for_twice_the_key_heads():
    for name, errors in found("none").items():
        if name.startswith("4 "):
            assert max(errors) < RIGHT, (name, errors)
        else:
            assert "Error" in errors, "what is to be mended is not there"
