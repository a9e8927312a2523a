"""What the rotary operators refuse: each documented limit, by its sentence."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops import rotary, rotary_checks  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402


def ones(*shape, dtype=torch.float16):
    return torch.ones(shape, dtype=dtype)


def mul(x, r, **more):
    return {"input": ones(*x), "r1": ones(*r), "r2": ones(*r), **more}


BSND = mul((2, 5, 4, 16), (1, 5, 1, 16))
MUL = {
    "a mode of Ascend 950": ({"rotary_mode": "quarter"}, "must be half or interleave"),
    "integers": ({"input": lambda x: x.int()}, "input is torch.int32, not one of"),
    "integer angles": ({"r2": lambda x: x.int()}, "r2 is torch.int32, not one of"),
    "r1 and r2": ({"r2": ones(2, 5, 1, 16)}, "must have the same shape"),
    "five dimensions": (mul((1, 2, 5, 4, 16), (1, 1, 5, 1, 16)), "has 5 dimensions and r1 5"),
    "angles of three": (mul((2, 5, 4, 16), (5, 1, 16)), "has 4 dimensions and r1 3"),
    "D 896": (mul((2, 5, 4, 896), (1, 5, 1, 896)), "is 896; it must be even and below 896"),
    "odd D": (mul((2, 5, 4, 15), (1, 5, 1, 15)), "is 15; it must be even"),
    "half a head": (mul((2, 5, 4, 16), (1, 5, 1, 8)), "are 8 wide and input 16"),
    "1SND": (mul((2, 5, 4, 16), (1, 5, 4, 16)), "none of the shapes that half takes"),
    "another sequence": (mul((2, 5, 4, 16), (1, 6, 1, 16)), "none of the shapes that half takes"),
    "BS1D, interleaved": (
        mul((2, 5, 4, 16), (2, 5, 1, 16), rotary_mode="interleave"),
        "none of the shapes that interleave takes",
    ),
    "BSND, interleaved": (
        mul((2, 5, 4, 16), (2, 5, 4, 16), rotary_mode="interleave"),
        "none of the shapes that interleave takes",
    ),
    "TND, interleaved": (
        mul((5, 4, 16), (5, 4, 16), rotary_mode="interleave"),
        "none of the shapes that interleave takes",
    ),
    "TND with 1ND": (mul((5, 4, 16), (1, 4, 16)), "none of the shapes that half takes"),
    "TND of 1000 heads": (mul((2, 1000, 16), (2, 1, 16)), "TND needs fewer than 1000 heads"),
    "batch 1000": (mul((1000, 2, 4, 16), (1, 2, 1, 16)), "BSND needs B and N below 1000, not 1000"),
    "1000 heads": (mul((2, 2, 1000, 16), (1, 2, 1, 16)), "BSND needs B and N below 1000, not 2"),
    "1000 rows, interleaved": (
        mul((25, 2, 40, 16), (1, 2, 1, 16), rotary_mode="interleave"),
        r"BSND needs B \* N below 1000, not 25 and 40",
    ),
    "broad BNSD": (mul((5, 5, 3, 32), (1, 1, 3, 32)), "BNSD needs more tokens"),
    "broad BNSD, unaligned": (mul((2, 2, 120, 16), (1, 1, 120, 16)), "BNSD needs more tokens"),
    "rotate before 2.10": ({"rotate": ones(16, 16)}, "rotate exists since torch_npu 2.10.0"),
}


@pytest.mark.parametrize("name", MUL)
def test_rotary_mul_refuses(name):
    changes, sentence = MUL[name]
    assert_refused(rotary.npu_rotary_mul, BSND, changes, sentence)


def test_rotary_mul_takes_what_is_just_below_its_limits():
    for shapes in (
        ((999, 2, 4, 16), (1, 2, 1, 16)),
        ((2, 2, 999, 16), (1, 2, 1, 16)),
        ((2, 5, 4, 894), (1, 5, 1, 894)),
        ((5, 5, 4, 32), (1, 1, 4, 32)),
        ((2, 2, 281, 16), (1, 1, 281, 16)),
        # One batch: nothing is spread over batch and heads.
        ((1, 25, 3, 32), (1, 1, 3, 32)),
    ):
        rotary.npu_rotary_mul(**mul(*shapes))
    rotary.npu_rotary_mul(**mul((27, 2, 37, 16), (1, 2, 1, 16), rotary_mode="interleave"))


def test_rotary_mul_by_release():
    flat = mul((5, 4, 16), (5, 1, 16))
    assert_refused(rotary.npu_rotary_mul, flat, {}, "since torch_npu 2.8.0.post2", release="2.7.1")
    for rotate, sentence in (
        (ones(16, 8), r"rotate is \[16, 8\] .* must be \[16, 16\]"),
        (torch.eye(16).int(), "rotate is torch.int32"),
    ):
        assert_refused(rotary.npu_rotary_mul, BSND, {"rotate": rotate}, sentence, release="2.10.0")


def pair(*shape):
    return {"query": ones(*shape, 4, 128), "key": ones(*shape, 2, 128)} | {
        name: ones(*shape, 1, 128) for name in ("cos", "sin")
    }


APPLY = {
    "interleaved": ({"rotary_mode": "interleave"}, "Atlas A2 and A3 have half only"),
    "BNSD": ({"layout": "BNSD"}, "Atlas A2 and A3 have BSND and TND"),
    "TND of four": ({"layout": "TND"}, "query has 4 dimensions; layout TND has 3"),
    "integers": ({"query": lambda x: x.int()}, "query is torch.int32"),
    "dtypes": ({"cos": lambda x: x.float()}, "cos is torch.float32 and query torch.float16"),
    "empty": (pair(2, 0), r"query \[2, 0, 4, 128\] is empty"),
    "one batch of angles": (
        {"cos": ones(1, 3, 1, 128), "sin": ones(1, 3, 1, 128)},
        "must have the same first 2 dimensions",
    ),
    "key's tokens": ({"key": ones(2, 4, 2, 128)}, "key .* must have the same first 2"),
    "D 96": (
        {n: x[..., :96] for n, x in pair(2, 3).items()},
        "the last dimension of query is 96 and of query 96; all must be 64, or all 128",
    ),
    "part of a head": (
        {"cos": ones(2, 3, 1, 64), "sin": ones(2, 3, 1, 64)},
        "the last dimension of cos is 64 and of query 128",
    ),
    "angles for each head": ({"cos": ones(2, 3, 4, 128)}, "1 in the place of the heads"),
    "too many heads": ({"query": ones(2, 3, 152, 128)}, "154 heads .* need 198144 bytes"),
}


@pytest.mark.parametrize("name", APPLY)
def test_apply_rotary_pos_emb_refuses(name):
    changes, sentence = APPLY[name]
    assert_refused(rotary.npu_apply_rotary_pos_emb, pair(2, 3), changes, sentence)


def test_apply_rotary_pos_emb_fits_as_many_heads_as_the_formula_says():
    """float16: 1280 n + 1024 bytes; the others: 2560 n + 2048; of 196608."""
    for dtype, most in ((torch.float16, 152), (torch.bfloat16, 76), (torch.float32, 76)):
        call = {n: x.to(dtype) for n, x in pair(1, 2).items()}
        fits = {"query": ones(1, 2, most - 2, 128, dtype=dtype)}
        rotary.npu_apply_rotary_pos_emb(**{**call, **fits})
        more = {"query": ones(1, 2, most - 1, 128, dtype=dtype)}
        assert_refused(rotary.npu_apply_rotary_pos_emb, call, more, f"{most + 1} heads")


def mrope_call(**more):
    return {
        "positions": torch.arange(5),
        "query": ones(5, 4 * 128),
        "key": ones(5, 2 * 128),
        "cos_sin_cache": ones(9, 128),
        "head_size": 128,
        **more,
    }


ROWS = torch.arange(5).repeat(3, 1)
BY_AXIS = {"positions": ROWS, "mrope_section": [16, 24, 24]}
MROPE = {
    "integers": ({"query": lambda x: x.int()}, "query is torch.int32"),
    "key's dtype": ({"key": lambda x: x.float()}, "key is .* query's dtype, torch.float16"),
    "cache's dtype": ({"cos_sin_cache": lambda x: x.float()}, "cos_sin_cache is .* query's dtype"),
    "three dimensions": ({"key": ones(5, 2, 128)}, "it must have 2 dimensions"),
    "head_size 80": (
        {"head_size": 80, "query": ones(5, 320)},
        "head_size is 80; .* multiple of 32",
    ),
    "rotary_dim 48": ({"cos_sin_cache": ones(9, 48)}, "rotary_dim is 48; .* multiple of 32"),
    "rotary_dim above": ({"head_size": 64}, "rotary_dim 128 must not be above head_size 64"),
    "width of key": ({"key": ones(5, 192)}, r"key \[5, 192\] must be \[5, heads \* 128\]"),
    "tokens of key": ({"key": ones(4, 256)}, r"key \[4, 256\] must be \[5, heads \* 128\]"),
    "no token": ({"positions": torch.arange(0)}, r"positions \[0\] must not be empty"),
    "an unknown style": ({"rotary_mode": "quarter"}, "must be half or interleaved"),
    "float positions": ({"positions": torch.arange(5.0)}, "positions are torch.float32"),
    "int32 positions": ({"positions": torch.arange(5).int()}, "since torch_npu 2.10.0"),
    "a position beyond": ({"positions": torch.arange(5, 10)}, "5 to 9 for a cache of 9 rows"),
    "a negative position": ({"positions": torch.arange(-1, 4)}, "from -1 to 3"),
    "rows without sections": ({"positions": ROWS}, r"plain RoPE .* takes \[tokens\]"),
    "sections without rows": ({"mrope_section": [16, 24, 24]}, r"sections \[rows, tokens\]"),
    "other sections": (
        {**BY_AXIS, "mrope_section": [24, 20, 20]},
        r"\[24, 20, 20\] is none of \[\[16, 24, 24\]\]",
    ),
    "four rows": ({**BY_AXIS, "positions": torch.arange(5).repeat(4, 1)}, "each of the 3 sections"),
    "sections of another width": (
        {**BY_AXIS, "cos_sin_cache": ones(9, 96)},
        "adds up to 64; it must be half of rotary_dim, 48",
    ),
    "an unknown cache mode": ({"cache_mode": "NZ"}, "cache_mode must be default or interleave"),
    "turns before 2.10": (
        {**BY_AXIS, "cache_mode": "interleave"},
        "cache_mode interleave takes three sections, since torch_npu 2.10.0",
    ),
}


@pytest.mark.parametrize("name", MROPE)
def test_mrope_refuses(name):
    changes, sentence = MROPE[name]
    assert_refused(rotary.npu_mrope, mrope_call(), changes, sentence)


def test_mrope_of_float32_and_of_2_10():
    wide = {
        n: x.float() if torch.is_tensor(x) and x.dim() == 2 else x for n, x in mrope_call().items()
    }
    narrow = {"head_size": 16, "cos_sin_cache": torch.ones(9, 16)}
    rotary.npu_mrope(**{**wide, **narrow})
    assert_refused(
        rotary.npu_mrope, wide, {"cos_sin_cache": torch.ones(9, 24)}, "must be a multiple of 16"
    )
    four = {
        "positions": torch.arange(5).repeat(4, 1),
        "mrope_section": [16] * 4,
        "cache_mode": "interleave",
    }
    assert_refused(rotary.npu_mrope, wide, four, "takes three sections", release="2.10.0")
    with settings(release="2.10.0"):
        rotary.npu_mrope(**mrope_call(positions=torch.arange(5).int()))


def inplace_call(width=64, **more):
    return {
        "positions": torch.arange(5),
        "query": ones(5, 4 * width),
        "key": ones(5, 2 * width),
        "head_size": width,
        "cos_sin_cache": ones(9, width),
        "is_neox_style": True,
        **more,
    }


INPLACE = {
    "float32": (
        {n: lambda x: x.float() for n in ("query", "key", "cos_sin_cache")},
        "query is torch.float32, not one of",
    ),
    "dtypes": ({"key": lambda x: x.bfloat16()}, "key torch.bfloat16 .* must be the same"),
    "bfloat16 by float32": (
        {n: lambda x: x.bfloat16() for n in ("query", "key")}
        | {"cos_sin_cache": lambda x: x.float()},
        "cos_sin_cache torch.float32; they must be the same",
    ),
    "three dimensions": ({"query": ones(5, 4, 64)}, r"must be \[5, hidden\]"),
    "tokens": ({"key": ones(4, 128)}, r"key \[4, 128\] must be \[5, hidden\]"),
    "no token": (
        {"positions": torch.arange(0), "query": ones(0, 256), "key": ones(0, 128)},
        "not empty, for 0 positions",
    ),
    "a narrow cache": ({"cos_sin_cache": ones(9, 8)}, "must be .rows, 16 to 4096, even"),
    "heads of key": ({"key": ones(5, 3 * 64)}, "each must be a multiple of the next"),
    "part of a head": ({"cos_sin_cache": ones(9, 96)}, "each must be a multiple of the next"),
    "GPT-J, another head": (
        {"is_neox_style": False, "head_size": 128},
        "head_size is 128 and cos_sin_cache 64 wide; in GPT-J style they must be the same",
    ),
    "a position beyond": ({"positions": torch.arange(5, 10)}, "from 5 to 9 for a cache of 9 rows"),
}


@pytest.mark.parametrize("name", INPLACE)
def test_rotary_embedding_refuses(name):
    changes, sentence = INPLACE[name]
    assert_refused(rotary._npu_rotary_embedding, inplace_call(), changes, sentence)


def test_rotary_embedding_keeps_the_first_cache_where_that_is_not_allowed(monkeypatch):
    rotary_checks.forget()
    call = inplace_call()
    other = {"cos_sin_cache": lambda x: x * 2}
    rotary._npu_rotary_embedding(**{**call, "cos_sin_cache": call["cos_sin_cache"] * 3})
    with settings(strict=True):
        rotary._npu_rotary_embedding(**call)
        rotary._npu_rotary_embedding(**{**call, "cos_sin_cache": call["cos_sin_cache"].clone()})
        for change in (other, {"cos_sin_cache": ones(10, 64)}):
            with pytest.raises(OperatorError, match="is another than the first"):
                rotary._npu_rotary_embedding(
                    **{**call, **{n: c(call[n]) if callable(c) else c for n, c in change.items()}}
                )
        rotary_checks.forget()
        rotary._npu_rotary_embedding(**{**call, "cos_sin_cache": call["cos_sin_cache"] * 2})
        # Another surface is another process.
        monkeypatch.setattr(rotary_checks.surface, "installed", lambda: "another")
        rotary._npu_rotary_embedding(**{**call, "cos_sin_cache": call["cos_sin_cache"] * 3})
    rotary_checks.forget()
    # A float32 model of a test's own.
    wide = {n: x.float() if torch.is_tensor(x) and x.dim() == 2 else x for n, x in call.items()}
    with settings(allow=["float32"]):
        rotary._npu_rotary_embedding(**wide)
