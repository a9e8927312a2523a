"""Limits of fused inference attention: masks, modes, int8 keys, sinks and results."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_batches import MASK  # noqa: E402
from npu_ops_fused_taken import BF16, dense, int8, paged, second  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score as v1,
)
from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score_v2 as v2,
)
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_compressed_masks(mode):
    call = dense(sparse_mode=mode)
    assert_refused(v1, call, {"atten_mask": None}, f"atten_mask is missing; sparse_mode={mode}")
    for shape in ((12, 12), (2048,), (2, 2048, 2048), (1024, 1024)):
        mask = torch.zeros(shape, dtype=torch.int8)
        assert_refused(v1, call, {"atten_mask": mask}, r"needs the compressed mask of shape \(2048")
    for dtype in (torch.float32, BF16, torch.int32):
        change = {"atten_mask": MASK.to(dtype)}
        assert_refused(v1, call, change, "it must be bool, int8 or uint8")
    for mask in (1 - MASK, torch.zeros_like(MASK), torch.triu(torch.ones_like(MASK))):
        assert_refused(v1, call, {"atten_mask": mask}, "differs from the plain causal mask in")
    for form in (MASK.bool(), MASK.to(torch.uint8), MASK[None], MASK[None, None]):
        assert torch.equal(v1(**{**call, "atten_mask": form})[0], v1(**call)[0])


def test_one_wrong_place_in_a_mask_is_found():
    """Also where the mask was right when it was last seen."""
    mask = MASK.clone()
    call = dense(atten_mask=mask)
    v1(**call)
    mask[1999, 7] = 1
    with pytest.raises(RuntimeError, match="differs from the plain causal mask in 1 places"):
        v1(**call)
    mask[1999, 7] = 0
    v1(**call)
    with torch.inference_mode():
        own = MASK.clone()
        v1(**{**call, "atten_mask": own})
        own[7, 9] = 0
        with pytest.raises(RuntimeError, match="in 1 places"):
            v1(**{**call, "atten_mask": own})


@pytest.mark.parametrize("mode", [-1, 5, 6, 7, 8, 9])
def test_modes_that_are_not_there(mode):
    assert_refused(v1, dense(), {"sparse_mode": mode}, f"sparse_mode={mode}; .* 0, 1, 2, 3 and 4")


def test_modes_of_the_second_version_without_groups():
    """Documented: 0 without a mask, 3 and 4 with the compressed one."""
    call = second(dense(kv_heads=8))
    assert_refused(v2, call, {"sparse_mode": 2}, "sparse_mode=2 in TND with as many key/value")
    for mode in (3, 4):
        v2(**{**call, "sparse_mode": mode})
    v2(**{**second(dense()), "sparse_mode": 2})


def test_bands_that_are_empty():
    call = dense(sparse_mode=4, pre_tokens=3, next_tokens=0)
    changed = {"pre_tokens": -3, "next_tokens": 2}
    assert_refused(v1, call, changed, "leave nothing between them")
    v1(**{**call, "pre_tokens": -3, "next_tokens": 3})


def test_masks_in_full():
    full = torch.zeros(6, 6, dtype=torch.bool)
    call = dense("BSND", sparse_mode=1, atten_mask=full)
    assert_refused(v1, call, {"atten_mask": None}, "sparse_mode=1 needs it in full")
    for shape in ((5, 6), (6, 5), (2, 6, 6), (3, 1, 6, 6), (2, 2, 6, 6), (6,)):
        mask = torch.zeros(shape, dtype=torch.bool)
        said = r"atten_mask has shape .* needs \(6, 6\)"
        assert_refused(v1, call, {"atten_mask": mask}, said)
    for shape in ((9, 16), (1, 6, 6), (2, 1, 6, 6), (1, 1, 8, 8)):
        v1(**{**call, "atten_mask": torch.zeros(shape, dtype=torch.bool)})
    ragged = dense(sparse_mode=0, atten_mask=None)
    assert_refused(v1, ragged, {"atten_mask": full}, "atten_mask in full with input_layout='TND'")
    # A paged cache needs columns for all entries of the block table.
    cached = paged("BSND", sparse_mode=0, atten_mask=torch.zeros(6, 384, dtype=torch.bool))
    mask = torch.zeros(6, 383, dtype=torch.bool)
    assert_refused(v1, cached, {"atten_mask": mask}, r"needs \(6, 384\)")


def test_precision_modes():
    for value in (-1, 4):
        assert_refused(v1, dense(), {"inner_precise": value}, f"inner_precise={value}; .* 0..3")
    many = second(dense(kv_heads=8))
    said = "inner_precise=1 in TND with as many .* for torch.bfloat16 it must be 0..0"
    assert_refused(v2, many, {"inner_precise": 1}, said)
    half = {name: many[name].half() for name in ("query", "key", "value")}
    v2(**{**many, **half, "inner_precise": 1})
    single = dense("BSND", rows=1, sparse_mode=0, atten_mask=None)
    assert_refused(v1, single, {"inner_precise": 2}, "inner_precise=2; it must be 0..1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pse_shift", torch.zeros(1)),
        ("query_rope", torch.zeros(1)),
        ("quant_scale2", torch.zeros(1)),
        ("antiquant_scale", torch.zeros(1)),
        ("query_padding_size", torch.zeros(1)),
        ("key_shared_prefix", torch.zeros(1)),
        ("actual_shared_prefix_len", [3]),
        ("antiquant_mode", 1),
    ],
)
def test_what_is_not_emulated(name, value):
    v1(**dense(), **{name: None if name != "antiquant_mode" else 0})
    assert_refused(v1, dense(), {name: value}, f"{name} is not emulated; leave it at its default")


def test_int8_keys():
    call = int8()
    for name in ("key_antiquant_scale", "value_antiquant_scale"):
        assert_refused(v1, call, {name: None}, "scale")
    both = {"key_antiquant_scale": None, "value_antiquant_scale": None}
    assert_refused(v1, call, both, "key is torch.int8 and its scale is missing")
    scale = call["key_antiquant_scale"]
    given = {"key_antiquant_scale": scale, "value_antiquant_scale": scale}
    assert_refused(v1, paged("BNSD", rows=1, sparse_mode=0, atten_mask=None), given, "is given")
    change = {"key_antiquant_offset": scale}
    assert_refused(v1, call, change, "the offsets of key and value must both be given")
    change = {"key_antiquant_scale": lambda x: x.half()}
    assert_refused(v1, call, change, "of key is torch.float16; it must be torch.bfloat16")
    change = {"value_antiquant_scale": lambda x: x[..., :64]}
    assert_refused(v1, call, change, r"of value has shape \(1, 2, 1, 64\); .*\(1, 2, 1, 128\)")
    with settings(allow=("float32",)):
        v1(**{**call, "query": call["query"].float()})
    for name in ("key_antiquant_mode", "value_antiquant_mode"):
        assert_refused(v1, call, {name: 1}, f"{name}=1 .* only 0, per channel")
    assert_refused(v1, call, {"block_size": 48}, "block_size=48; .* multiple of 32 .*int8 keys")
    mixed = {"value": call["value"].to(BF16)}
    assert_refused(v1, call, mixed, "value is torch.bfloat16 and key is torch.int8")
    more = paged("BNSD", sparse_mode=0, atten_mask=None)
    changed = {"query": more["query"], "actual_seq_lengths": more["actual_seq_lengths"]}
    assert_refused(v1, call, changed, "int8 keys and values need Q_S = 1")


def test_sinks():
    sinks = torch.zeros(8, dtype=BF16)
    call = second(dense(learnable_sink=sinks))
    assert_refused(v2, call, {"learnable_sink": lambda x: x.float()}, "it must be bfloat16")
    change = {"learnable_sink": lambda x: x[:4]}
    assert_refused(v2, call, change, r"learnable_sink has shape \(4,\); it must be \(8,\)")
    changed = second(dense("BSND"))
    assert_refused(v2, call, changed, "learnable_sink with input_layout='BSND'; use 'TND'")
    wide = second(dense(width=192, kv_heads=8))
    assert_refused(v2, call, wide, "learnable_sink with values of head size 192; 128 is the most")


def test_what_out_must_be():
    from ascend_patch.kernels.npu_ops.fused_infer import v1_out

    call = dense()
    out, lse = torch.empty(12, 8, 128, dtype=BF16), torch.empty(1)
    for wrong, said in (
        ([out], "out has 1 tensors"),
        ([out[:6], lse], "out's attention_out has shape"),
        ([out, torch.empty(7)], "out's softmax_lse has shape"),
        ([out.float(), lse], "out's attention_out is torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=f"^npu_fused_infer_attention_score: {said}"):
            v1_out(**call, out=wrong)
