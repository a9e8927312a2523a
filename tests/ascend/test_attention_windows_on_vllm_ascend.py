"""patch_attention_router and sliding windows, in every release that has them wrong.

vLLM's window counts the query's own token. 0.11.0 to 0.18.0 give the operators none that counts;
0.23.0 gives them one key more.
"""

from __future__ import annotations

import pytest
from ascend_attention_cases import STEPS, WINDOW
from ascend_attention_runs import FINAL, RELEASES, both

pytestmark = pytest.mark.slow

RIGHT, WRONG = 1e-4, 0.05
WITHOUT_A_WINDOW = ("0.11.0", "0.13.0", "0.18.0")
# The band that TND refuses for this head size is 0.23.0's own call.
OF_256 = tuple(release for release in FINAL if release != "0.23.0")


def is_right(found: dict) -> None:
    assert found["error"] < RIGHT, found
    # Controls: a window of another size is another answer.
    assert found["one more"] > WRONG
    assert found["one fewer"] > WRONG


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("state", STEPS)
def test_a_window_is_seen_in_every_state(release, state):
    unpatched, patched = both(release, f"window {state}")
    assert unpatched["error"] > WRONG
    is_right(patched)
    assert [call["before"] for call in patched["calls"]] == [WINDOW - 1]


@pytest.mark.parametrize("release", FINAL)
@pytest.mark.parametrize("name", ["window pooling ChunkedPrefill", "mixed window", "padded window"])
def test_in_mixed_and_padded_steps_too(release, name):
    unpatched, patched = both(release, name)
    assert unpatched["error"] > WRONG
    is_right(patched)


@pytest.mark.parametrize("release", OF_256)
@pytest.mark.parametrize("state", STEPS)
def test_heads_of_256_elements_have_a_call_for_each_prompt(release, state):
    unpatched, patched = both(release, f"window 256 {state}")
    assert unpatched["error"] > WRONG
    is_right(patched)
    assert "TND" not in {call["layout"] for call in patched["calls"]}


@pytest.mark.parametrize("release", WITHOUT_A_WINDOW)
@pytest.mark.parametrize("state", STEPS)
def test_a_window_that_hides_nothing_is_left_alone(release, state):
    unpatched, patched = both(release, f"wide window {state}")
    assert patched["error"] < RIGHT
    if state == "DecodeOnly":
        # The release copies the whole cache for it, and 0.13.0 loses what it computes.
        assert unpatched["calls"][0]["layout"] == "BSH"
        assert (unpatched["error"] < RIGHT) == (release != "0.13.0")
        assert patched["calls"][0]["layout"] == "TND"
    else:
        assert patched == unpatched


@pytest.mark.parametrize("release", ["0.18.0", "0.23.0"])
@pytest.mark.parametrize("state", STEPS)
def test_sinks_with_a_window_get_the_plain_mask(release, state):
    unpatched, patched = both(release, f"sinks window {state}")
    if release == "0.18.0":
        assert "atten_mask differs from the plain causal mask" in unpatched["fault"]
    else:
        assert unpatched["error"] > WRONG
    # bfloat16.
    assert patched["error"] < 0.02
    assert min(patched["one more"], patched["one fewer"]) > WRONG
    (call,) = patched["calls"]
    assert call["operator"] == "npu_fused_infer_attention_score_v2"
    assert (call["mask"], call["before"], call["behind"]) == ("causal", WINDOW - 1, 0)


@pytest.mark.parametrize("release", FINAL)
def test_an_encoder_s_window_is_on_both_sides(release):
    unpatched, patched = both(release, "encoder window")
    assert unpatched["error"] > WRONG
    is_right(patched)
    unpatched, patched = both(release, "encoder")
    assert unpatched["error"] < RIGHT
    assert patched == unpatched
