"""patch_gdn_attn through a release's own builder and layers.

Against the recurrence over each request's whole text, in float64: what is right is within 2e-3 in
float16, what is wrong is off by a tenth and more.
"""

from __future__ import annotations

import pytest
from ascend_gdn_runs import RELEASES, both

pytestmark = pytest.mark.slow

RIGHT, WRONG = 2e-3, 0.1
LAYERS = [
    (release, kind)
    for release in RELEASES
    for kind in ("qwen3_next", "qwen3_5")
    if kind == "qwen3_next" or "0.18.0" in release
]
ALL = pytest.mark.parametrize(("release", "kind"), LAYERS)


@ALL
@pytest.mark.parametrize("name", ["prompts", "chunks of prompts", "one token beside a prompt"])
def test_prefill_reads_nothing_of_the_device(release, kind, name):
    unpatched, patched = both(release, f"{kind}: {name}")
    assert max(unpatched["errors"]) < RIGHT
    assert max(patched["errors"]) < RIGHT
    for step in patched["layer"] + patched["builder"]:
        assert step == {}, "the device was read"
    for step in unpatched["layer"]:
        assert sum(step.values()) >= 4, "what is to be mended is not there"
        assert step["by mask"] == 1


@ALL
def test_decode_is_the_release_s_own_and_reads_the_states_that_prefill_left(release, kind):
    unpatched, patched = both(release, f"{kind}: decode")
    assert max(unpatched["errors"]) < RIGHT
    assert max(patched["errors"]) < RIGHT
    assert patched["layer"][1:] == unpatched["layer"][1:] == [{}, {}]


@pytest.mark.parametrize("release", RELEASES)
def test_decode_reads_them_where_k_and_v_differ(release):
    """A transposed state could not pass: K is twice V here, and half of it elsewhere."""
    unpatched, patched = both(release, "qwen3_next: sizes of K and V")
    assert max(unpatched["errors"]) < RIGHT
    assert max(patched["errors"]) < RIGHT
