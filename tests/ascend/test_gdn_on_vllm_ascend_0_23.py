"""0.23.0's chunked rule on the metadata of its builder, with sequences that have no tokens.

Against the recurrence in float64; its operators multiply in bfloat16.
"""

from __future__ import annotations

import functools

import pytest
from ascend_gdn_runs import run

pytestmark = pytest.mark.slow

RULE = """
import ascend_fla_0_23, ascend_gdn_metadata as m, device_reads
import gdn_judge, gdn_oracle
from vllm_ascend.ops.triton.fla.chunk import chunk_gated_delta_rule
ascend_fla_0_23.install()
torch.set_num_threads(1)
counts = {}

def rule(**given):
    assert given.pop("state_layout") == "KV"
    starts, out = given.pop("cu_seqlens"), given.pop("out")
    metadata = m.ours_0_23(starts.diff().tolist(), torch.device("cpu"))
    with device_reads.counted() as reads:
        found, final = chunk_gated_delta_rule(
            **given, cu_seqlens=starts, prebuilt_meta=metadata, output_final_state=True,
            head_first=False,
        )
    counts[name] = sum(reads.values())
    out.copy_(found)
    return out, final

found = {}
for name, lengths in CASES.items():
    case = gdn_oracle.Case(tuple(lengths), layout="KV", dtype="bfloat16")
    try:
        found[name] = [*gdn_judge.judge(case, SEED, run=rule), counts[name]]
    except Exception as fault:
        found[name] = f"{type(fault).__name__}: {fault}"
print(json.dumps([found, patch()]))
"""
CASES = {"full": [70, 5, 130], "padded": [70, 130, 0, 0], "in the middle": [128, 0, 70, 0, 3]}
RIGHT, WRONG = 2e-2, 0.1


@functools.cache
def found(patches: str) -> dict:
    results, state = run("0.23.0", f"CASES = {CASES}\n{RULE}", patches=patches)
    print(patches, results, state)
    assert state["state"] == ("off" if patches == "none" else "applied"), state
    return results


def test_ours_is_right_and_reads_nothing():
    for name, (error, states, reads) in found("gdn_attn").items():
        assert max(error, states) < RIGHT, name
        assert reads == 0, name


def test_the_release_s_own_is_right_without_an_empty_sequence():
    error, states, reads = found("none")["full"]
    assert max(error, states) < RIGHT
    assert reads == 0


def test_a_batch_that_is_padded_is_read_twice_in_each_layer():
    error, states, reads = found("none")["padded"]
    assert max(error, states) < RIGHT
    assert reads == 2


def test_an_empty_sequence_in_the_middle_is_wrong_on_the_release_s_own():
    """It is looked up under another number: what it should have written is what was there."""
    error, states, _ = found("none")["in the middle"]
    # No number at all where memory was poisoned.
    assert not max(error, states) < WRONG
