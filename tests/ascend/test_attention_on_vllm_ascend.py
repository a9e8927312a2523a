"""patch_attention_router through a release's own metadata builder and attention class.

In float32, against attention computed from its definition in float64: what is right is within
1e-4, what is wrong is off by the size of the values themselves.
"""

from __future__ import annotations

import pytest
from ascend_attention_runs import both, run

pytestmark = pytest.mark.slow

RIGHT, WRONG = 1e-4, 0.1
FUSION, FUSED = "npu_fusion_attention", "npu_fused_infer_attention_score"
CACHED = ("PrefillCacheHit", "ChunkedPrefill", "DecodeOnly", "SpecDecoding")


@pytest.mark.parametrize("state", CACHED)
def test_a_causal_pooling_model_loses_its_cache_on_0_13_0(state):
    """What embeddings had when their prefix was cached: the operator is given no cache."""
    unpatched, patched = both("0.13.0", f"pooling {state}")
    assert unpatched["error"] > 1
    assert [call["operator"] for call in unpatched["calls"]] == [FUSION]
    assert patched["error"] < RIGHT
    assert [call["operator"] for call in patched["calls"]] == [FUSED]
    assert patched["calls"][0]["paged"]


@pytest.mark.parametrize("state", CACHED)
def test_it_does_not_on_0_18_0_which_is_left_alone(state):
    unpatched, patched = both("0.18.0", f"pooling {state}")
    assert unpatched["error"] < RIGHT
    assert patched == unpatched


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
def test_pooling_without_a_cache_is_left_alone(release):
    unpatched, patched = both(release, "pooling PrefillNoCache")
    assert unpatched["error"] < RIGHT
    assert patched == unpatched


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
@pytest.mark.parametrize(
    "name", ["full PrefillNoCache", "full PrefillCacheHit", "full ChunkedPrefill", "cross"]
)
def test_attention_that_is_not_causal_is_given_a_causal_mask(release, name):
    unpatched, patched = both(release, name)
    assert unpatched["error"] > WRONG
    assert unpatched["calls"][0]["mask"] == "causal"
    assert patched["error"] < RIGHT
    assert patched["calls"][0]["mask"] == "none"


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
def test_a_single_query_sees_all_keys_under_a_causal_mask_too(release):
    unpatched, patched = both(release, "full DecodeOnly")
    assert unpatched["error"] < RIGHT
    assert patched == unpatched


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
def test_pooling_over_all_tokens_reads_the_cache_where_there_is_one(release):
    unpatched, patched = both(release, "full pooling PrefillCacheHit")
    assert unpatched["error"] > WRONG
    assert patched["error"] < RIGHT
    unpatched, patched = both(release, "full pooling PrefillNoCache")
    assert unpatched["error"] < RIGHT
    assert patched == unpatched


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
def test_requests_that_pad_a_step_need_no_lengths(release):
    unpatched, patched = both(release, "dummy request")
    assert "actual_seq_lengths_kv has 3 entries for a batch of 4" in unpatched["fault"]
    assert patched["error"] < RIGHT


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0"])
def test_a_step_without_a_query_computes_nothing(release):
    unpatched, patched = both(release, "empty")
    assert unpatched["fault"]
    assert not patched["fault"]
    assert patched["calls"] == []


DRAFT = """
model = Model(window=20, seed=SEED)
batch = Batch(model, [130, 30], [1, 1], "DecodeOnly")
metadata = batch.metadata()
first = batch.forward(metadata)
# The last key of the first request is forgotten: in place, then by another list.
shorter = [n - 1 for n in metadata.seq_lens_list]
metadata.seq_lens_list[:] = shorter
metadata.seq_lens -= 1
in_place = batch.forward(metadata)
fresh = batch.metadata()
fresh.seq_lens_list, fresh.seq_lens = list(shorter), metadata.seq_lens
print(json.dumps([ascend_attention.digest(x) for x in (first, in_place, batch.forward(fresh))]))
"""


@pytest.mark.parametrize("release", ["0.13.0"])
def test_a_draft_s_next_step_has_its_own_lengths(release, seed):
    """What is kept with a step's metadata does not outlive what it was made of."""
    first, in_place, fresh = run(release, DRAFT, seed=seed)
    assert in_place == fresh
    assert first != in_place
