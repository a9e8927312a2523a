"""Each limit of npu_fusion_attention: a call that is taken, one change, and what is said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import npu_ops_batches as batches  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops.fusion import npu_fusion_attention as fusion  # noqa: E402

MASK = batches.MASK.bool()


def taken(layout="TND", heads=4, kv_heads=2, width=64, rows=5, **options):
    made = batches.make(
        batches.Shape(
            (rows, rows), (rows, rows), heads, kv_heads, width, dtype="bfloat16", layout=layout
        )
    )
    ends = {"actual_seq_qlen": [rows, 2 * rows], "actual_seq_kvlen": [rows, 2 * rows]}
    return {
        "query": made.query,
        "key": made.key,
        "value": made.value,
        "head_num": heads,
        "input_layout": layout,
        "atten_mask": MASK,
        "sparse_mode": 3,
        **(ends if layout == "TND" else {}),
        **options,
    }


@pytest.mark.parametrize(
    ("layout", "changes", "sentence"),
    [
        ("TND", {"input_layout": "NTD"}, "input_layout='NTD'; it must be one of BSH, SBH"),
        ("TND", {"key": lambda x: x.half()}, "key is torch.float16 and query is torch.bfloat16"),
        ("TND", {"query": lambda x: x.double()}, "it must be float16, bfloat16 or float32"),
        ("BSH", {"query": lambda x: x[0]}, r"query has shape .* needs \(B, S, H\)"),
        ("TND", {"value": lambda x: x[:, :1]}, "value has shape .* but for the head size"),
        ("TND", {"head_num": 8}, "query has 4 heads; head_num says 8"),
        ("TND", {"head_num": 257}, "head_num=257; it must be 1..256"),
        ("BSH", {"head_num": 3}, "query has H=256, no multiple of head_num=3"),
        ("TND", {"key": lambda x: x[..., :32]}, "head sizes are 64 .query., 32 .key."),
        ("TND", {"keep_prob": 0.9}, "keep_prob=0.9 is not emulated"),
        ("TND", {"inner_precise": 3}, "inner_precise=3; it must be 0, 1 or 2"),
        ("BSH", {"softmax_layout": "TND"}, "goes with input_layout='TND' only"),
        ("TND", {"sparse_mode": 5}, "sparse_mode=5 is not emulated"),
        ("TND", {"sparse_mode": 7}, "sparse_mode=7 is not emulated"),
        ("TND", {"pse": torch.zeros(1)}, "pse is not emulated"),
        ("TND", {"padding_mask": torch.zeros(1)}, "padding_mask is not emulated"),
        ("TND", {"prefix": [1, 2]}, "prefix is not emulated"),
        ("TND", {"dropout_mask": torch.zeros(1)}, "dropout_mask is not emulated"),
        ("TND", {"atten_mask": MASK.to(torch.int8)}, "atten_mask is torch.int8; .* bool or uint8"),
        ("TND", {"atten_mask": MASK[:10, :10]}, "needs the compressed mask"),
        ("TND", {"atten_mask": ~MASK}, "differs from the plain causal mask"),
        ("TND", {"sparse_mode": 0, "atten_mask": MASK[None]}, "in TND it must be .longest query"),
        ("BSH", {"sparse_mode": 0, "atten_mask": MASK}, r"needs \(5, 5\), \(1, 1, 5, 5\)"),
        ("TND", {"sparse_mode": 4, "pre_tockens": -3, "next_tockens": 2}, "leave nothing between"),
        ("TND", {"actual_seq_qlen": None}, "actual_seq_qlen is missing; input_layout='TND'"),
        ("TND", {"actual_seq_kvlen": [10]}, "actual_seq_kvlen has 1 entries for 2 sequences"),
        ("TND", {"actual_seq_qlen": [5, 3]}, "actual_seq_qlen has 3 at place 1 after 5"),
        ("TND", {"actual_seq_qlen": [5, 0, 10]}, "actual_seq_qlen has 0 at place 1 after 5"),
        ("TND", {"actual_seq_kvlen": [5, 11]}, "actual_seq_kvlen ends with 11; .* only 10 tokens"),
        ("TND", {"actual_seq_qlen": [0] * 2048 + [10]}, "has 2049 entries; 2048 is the most"),
        ("TND", {"sink": torch.zeros(4)[:3]}, r"sink is torch.float32 of shape \(3,\)"),
        ("TND", {"sink": torch.zeros(4).half()}, "it must be float32 of"),
    ],
)  # fmt: skip
def test_limits(layout, changes, sentence):
    assert_refused(fusion, taken(layout), changes, sentence)


def test_more_limits():
    assert_refused(fusion, taken(heads=6, kv_heads=3), taken(heads=4, kv_heads=3), "4 heads, no m")
    assert_refused(fusion, taken(width=768), taken(width=769), "the head size is 769; .* 1..768")
    value = {"value": lambda x: torch.cat((x, x), -1)}
    assert_refused(fusion, taken(), value, "value's no larger")
    narrow = taken()
    fusion(**{**narrow, "value": narrow["value"][..., :32]})
    # A row of a mask that hides everything, in TND only.
    blind = torch.zeros(5, 5, dtype=torch.bool)
    blind[2] = True
    call_ = taken(sparse_mode=1, atten_mask=torch.zeros(5, 5, dtype=torch.bool))
    assert_refused(fusion, call_, {"atten_mask": blind}, "hides every key of row 2 of sequence 0")
    out = fusion(**taken("BNSD", sparse_mode=1, atten_mask=blind))[0]
    assert not out[:, :, 2].any()
    assert out[:, :, 1].any()
