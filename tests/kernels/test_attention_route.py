"""The routing table alone: what must be answered is, and what is refused is told why."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from ascend_patch.kernels.attention import table
from ascend_patch.kernels.attention.case import (
    ATTENTION_TYPES,
    FUSED_INFER,
    FUSED_INFER_V2,
    FUSION,
    HOST,
    NOTHING,
    STATES,
    Case,
    Route,
)
from ascend_patch.kernels.attention.refusals import REFUSALS
from ascend_patch.kernels.attention.route import route

MUST_ANSWER = [
    Case(
        state,
        causal=causal,
        head_size=head_size,
        num_heads=8,
        num_kv_heads=8 // group,
        sliding_window=window,
        max_query_len=1 if state == "decode" else 5,
        max_seq_len=longest,
        soc=soc,
        dtype=dtype,
    )
    for state, causal, head_size, window, group, longest, soc, dtype in itertools.product(
        STATES,
        (True, False),
        (64, 128, 192, 256),
        (None, 1, 64),
        (1, 4, 8),
        (0, 9, 4000),
        ("A2", "A3", "emulated"),
        ("bfloat16", "float16"),
    )
]

# Each refusal with a case that only it refuses.
REFUSED = {
    "system": Case("decode", soc="310P"),
    "state": Case("drafting"),
    "attention type": Case("decode", attn_type="linear"),
    "capture": Case("decode", capturing=True),
    "quantised cache": Case("chunked", kv_dtype="int8"),
    "dtype": Case("chunked", dtype="float64"),
    "float32": Case("chunked", dtype="float32"),
    "latent heads": Case("decode", head_size=576, num_heads=16, num_kv_heads=1),
    "head size": Case("chunked", head_size=80),
    "fusion head size": Case("prefill", causal=False, head_size=776),
    "heads": Case("decode", num_heads=7, num_kv_heads=2),
    "too many heads": Case("decode", num_heads=128, num_kv_heads=1),
    "wide token": Case("decode", num_heads=256, num_kv_heads=256, head_size=256),
    "requests": Case("decode", batch=4097),
    "window": Case("decode", sliding_window=0),
    "sinks without a causal mask": Case("chunked", sinks=True, causal=False),
    "sinks' head size": Case("decode", sinks=True, head_size=256),
    "sinks' dtype": Case("decode", sinks=True, dtype="float16"),
}


def test_what_must_be_answered_is():
    refused = [(case, route(case)) for case in MUST_ANSWER if route(case).operator == HOST]
    assert not refused, refused[0]


def test_every_refusal_has_its_case_and_its_sentence():
    """A refusal that nothing reaches would be a sentence that nobody checks."""
    assert set(REFUSED) == {refusal.name for refusal in REFUSALS}
    for name, case in REFUSED.items():
        found = route(case)
        assert (found.row, found.operator) == (name, HOST)
        assert found.reason.endswith(": the host's own attention runs.")
        assert "{" not in found.reason
        assert [r.name for r in REFUSALS if r.when(case)] == [name]


def test_limits_are_where_they_are_said_to_be():
    assert route(Case("decode", batch=4096)).operator == FUSED_INFER
    assert route(Case("prefill", causal=False, batch=1024)).operator == FUSION
    assert route(Case("prefill", causal=False, batch=1025)).row == "requests"
    assert route(Case("decode", num_heads=64, num_kv_heads=1)).operator == FUSED_INFER
    assert route(Case("decode", num_heads=65, num_kv_heads=1)).row == "too many heads"
    assert route(Case("prefill", causal=False, head_size=768)).operator == FUSION
    assert route(Case("prefill", causal=False, dtype="float32")).operator == FUSION
    assert route(Case("decode", dtype="float32", soc="emulated")).operator == FUSED_INFER
    assert route(Case("decode", kv_dtype="bfloat16")).operator == FUSED_INFER


def test_every_case_matches_a_row_and_every_row_a_case():
    """Over every combination of the features that rows ask for."""
    seen = set()
    for state, causal, window, sinks, attn_type, head_size, longest in itertools.product(
        STATES, (True, False), (None, 64), (True, False), ATTENTION_TYPES, (128, 256), (9, 4000)
    ):
        case = Case(
            state,
            causal=causal,
            sliding_window=window,
            sinks=sinks,
            attn_type=attn_type,
            head_size=head_size,
            max_seq_len=longest,
        )
        seen.add(route(case).row)
    assert {row.name for row in table.ROWS} <= seen


def test_names_are_unique():
    names = [x.name for x in (*table.ROWS, *REFUSALS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", MUST_ANSWER[::7], ids=str)
def test_modes_masks_and_tokens_fit_together(case):
    found = route(case)
    assert (found.mask == "causal") == (found.sparse_mode in (3, 4))
    band = found.sparse_mode == 4
    assert (found.pre_tokens is not None) == band
    assert (found.next_tokens is not None) == band
    if band:
        assert found.pre_tokens == case.sliding_window - 1
        assert found.next_tokens == (0 if case.causal else case.sliding_window - 1)
    # What the releases and the documentation forbid.
    assert not (
        band and found.layout == "TND" and case.head_size == 256 and found.operator == FUSED_INFER
    )
    assert found.cache == "none" or found.operator != FUSION
    unpaged_without_mask = found.sparse_mode == 0 and found.cache == "none"
    assert not (unpaged_without_mask and found.operator in (FUSED_INFER, FUSED_INFER_V2))
    assert found.kv_lens == (
        "cumulative" if found.cache == "none" and found.layout == "TND" else "per request"
    )


def test_pooling_changes_nothing():
    """Seed 000: a causal model's kind decided, and its cache was lost."""
    for case in MUST_ANSWER:
        assert route(replace(case, pooling=True)) == route(case)


def test_a_cached_prefix_is_read_whatever_the_state():
    for state in STATES[1:]:
        found = route(Case(state, pooling=True, max_query_len=4))
        assert (found.operator, found.cache, found.sparse_mode) == (FUSED_INFER, "paged", 3)


def test_more_than_sixteen_speculated_tokens_are_a_chunk():
    case = Case("speculative", max_query_len=17, min_query_len=17, max_seq_len=90)
    assert route(case) == route(replace(case, state="chunked"))


def test_cross_attention_reads_its_cache_and_is_never_causal():
    for state in STATES:
        found = route(Case(state, causal=True, attn_type="encoder_decoder"))
        assert (found.row, found.sparse_mode, found.cache) == ("full-cache", 0, "paged")


def test_encoders_never_read_a_cache():
    for attn_type, state in itertools.product(("encoder", "encoder_only"), STATES):
        found = route(Case(state, causal=True, attn_type=attn_type))
        assert (found.operator, found.sparse_mode, found.cache) == (FUSION, 0, "none")


def test_a_window_that_is_not_known_to_hide_nothing_is_kept():
    wide = Case("decode", head_size=192, num_kv_heads=2, sliding_window=64)
    assert route(wide).row == "alone-window-cache"
    assert route(replace(wide, max_seq_len=65)).row == "alone-window-cache"
    assert route(replace(wide, max_seq_len=64)).row == "causal-cache"
    assert "hides nothing" in route(replace(wide, max_seq_len=64)).reason


def test_what_cann_has_a_kernel_for_in_tnd():
    """Its own code: 64 and 128; 192 in bfloat16, or grouped; bands to 128.

    256, even grouped, has a kernel in some CANN alone: another one's error names 192, 128 and 64.
    """
    for head_size, group, dtype, window, layout in (
        (64, 1, "float16", 9, "TND"),
        (128, 8, "bfloat16", 9, "TND"),
        (192, 1, "bfloat16", None, "TND"),
        (192, 1, "float16", None, "BSH"),
        (192, 4, "float16", None, "TND"),
        (192, 1, "bfloat16", 9, "BSH"),
        (192, 4, "bfloat16", 9, "BSH"),
        (256, 1, "bfloat16", None, "BSH"),
        (256, 4, "bfloat16", None, "BSH"),
        (256, 8, "float16", None, "BSH"),
        (256, 4, "bfloat16", 9, "BSH"),
    ):
        for state in STATES:
            case = Case(
                state,
                head_size=head_size,
                num_kv_heads=8 // group,
                dtype=dtype,
                sliding_window=window,
            )
            assert route(case).layout == layout, case
            assert route(case).per_request == (layout == "BSH")


def test_blocks_that_an_operator_does_not_take_are_copied():
    for head_size, block_size, cache in (
        (128, 16, "paged"),
        (128, 1024, "paged"),
        (128, 24, "copied"),
        (128, 1040, "copied"),
        (256, 128, "paged"),
        (256, 64, "copied"),
    ):
        case = Case("decode", head_size=head_size, num_kv_heads=2, block_size=block_size)
        assert route(case).cache == cache
        alone = replace(case, num_kv_heads=8, head_size=256)
        assert route(alone).cache == ("paged" if block_size == 128 else "copied")


def test_an_empty_batch_is_nothing():
    for case in (Case("decode", batch=0), Case("chunked", max_query_len=0)):
        assert route(case) == Route(
            "nothing", NOTHING, reason="there is no query, so there is nothing to compute"
        )


def test_what_is_remembered_is_bounded(monkeypatch):
    from ascend_patch.kernels.attention import route as module

    monkeypatch.setattr(module, "_MOST_REMEMBERED", 8)
    for length in range(40):
        route(Case("decode", max_seq_len=length))
        assert len(module._remembered) <= 8


def test_a_case_can_be_made_by_keyword_alone():
    """`explain --case` does: every field but the state has a default."""
    assert next(iter(fields(Case))).name == "state"
    assert Case(state="decode") == Case("decode")


def test_neither_table_nor_route_imports_torch():
    code = (
        "import sys; import ascend_patch.kernels.attention.route as r; "
        "import ascend_patch.kernels.attention.releases; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "print(r.route(r.Case('decode')).row)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "causal-cache", done.stderr
