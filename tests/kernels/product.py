"""The factors of a call, their full product, and samples of it that meet every pair of values."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from ascend_patch.kernels.rope import angles_cases, cases, fused_cases

Case = dict[str, Any]

HEADS = (*cases.HEADS, (256, 256))
HEAD_COUNTS = ((1, 1), (12, 1), (32, 8), (64, 4), (64, 64))
TOKENS = (0, 1, 7, 257, 4096)
# None, or (a section of 64 frequencies, interleaved, text positions).
MROPE = (
    None,
    ((16, 24, 24), False, False),
    ((24, 20, 20), False, False),
    ((16, 24, 24), True, False),
    ((24, 20, 20), True, False),
    ((16, 24, 24), False, True),
)
ROTARY: Mapping[str, Sequence[Any]] = {
    "is_neox_style": cases.STYLES,
    "dtype": cases.DTYPES,
    "heads": HEADS,
    "counts": HEAD_COUNTS,
    "tokens": TOKENS,
    "from_qkv": (True, False),
    "cache_dtype": ("equal", "float32", "bfloat16"),
    "positions_dtype": ("int32", "int64"),
    "positions": ("random", "repeated", "maximal"),
    "mrope": MROPE,
}
FUSED: Mapping[str, Sequence[Any]] = {
    **{name: values for name, values in ROTARY.items() if name != "from_qkv"},
    "has_gate": (False, True),
    "has_bias": (False, True),
    "weight_offset": (0.0, 1.0),
    "weight_dtype": cases.DTYPES,
    "eps": (1e-6, 1e-5),
}
ANGLES: Mapping[str, Sequence[Any]] = {
    "is_neox_style": cases.STYLES,
    "dtype": cases.DTYPES,
    "heads": angles_cases.HEADS,
    "count": (1, 12, 16, 64),
    "places": (0, 1, 7, 129, 1024),
    "layout": angles_cases.LAYOUTS,
    "from_qkv": (False, True),
    "angles_dtype": ("equal", "float32", "bfloat16"),
}


def covering(factors: Mapping[str, Sequence[Any]], seed: int) -> list[Case]:
    """Random cases in which every two values of two factors meet, about as few as it takes."""
    draw = random.Random(seed)
    missing = pairs(factors)
    found = []
    while missing:
        case = dict(draw.choice(sorted(missing, key=repr)))
        for name in draw.sample(list(factors), len(factors)):
            if name not in case:
                values = draw.sample(list(factors[name]), len(factors[name]))
                fixed = list(case.items())
                case[name] = max(
                    values, key=lambda v: sum(_pair((name, v), f) in missing for f in fixed)
                )
        missing -= set(pairs_of(case))
        found.append({name: case[name] for name in factors})
    return found


def pairs(factors: Mapping[str, Sequence[Any]]) -> set[tuple]:
    """All pairs that a covering sample must meet."""
    found = set()
    for one, other in combinations(factors, 2):
        for a, b in product(factors[one], factors[other]):
            found.add(_pair((one, a), (other, b)))
    return found


def pairs_of(case: Case) -> Iterator[tuple]:
    for one, other in combinations(case.items(), 2):
        yield _pair(one, other)


def _pair(one: tuple, other: tuple) -> tuple:
    return (one, other) if one[0] < other[0] else (other, one)


def full(factors: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """The whole product; sections of 64 frequencies where there are 64."""
    for values in product(*factors.values()):
        case = dict(zip(factors, values, strict=True))
        if case.get("mrope") is None or case["heads"][1] == 128:
            yield case


def rotary_case(case: Case) -> cases.RopeCase:
    head_size, rotary_dim = case["heads"]
    cache_dtype = case["cache_dtype"]
    section, interleaved, text = case["mrope"] or (None, False, False)
    if section:
        # In the proportions of 64 frequencies, where there are more or fewer.
        time, height = (rotary_dim // 2 * size // 64 for size in section[:2])
        section = (time, height, rotary_dim // 2 - time - height)
    return cases.RopeCase(
        case["tokens"],
        *case["counts"],
        head_size,
        rotary_dim,
        case["is_neox_style"],
        case["dtype"],
        case["dtype"] if cache_dtype == "equal" else cache_dtype,
        case["positions"],
        case["positions_dtype"],
        from_qkv=case.get("from_qkv", True),
        mrope_section=section,
        mrope_interleaved=interleaved,
        text_only=text,
    )


def fused_case(case: Case) -> fused_cases.FusedCase:
    options = ("weight_offset", "has_gate", "has_bias", "weight_dtype", "eps")
    return fused_cases.FusedCase(rotary_case(case), *(case[name] for name in options))


def angles_case(case: Case) -> angles_cases.AnglesCase:
    angles_dtype = case["angles_dtype"]
    return angles_cases.AnglesCase(
        case["places"],
        case["count"],
        *case["heads"],
        *case["layout"],
        case["is_neox_style"],
        case["dtype"],
        case["dtype"] if angles_dtype == "equal" else angles_dtype,
        case["from_qkv"],
    )
