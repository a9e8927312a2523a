"""Compile every case for Ascend, execute a spread on x86; run by test_rope_ascend.py.

    python tests/kernels/rope_ascend.py compile    # a row for each case: launches, bytes, buffer
    python tests/kernels/rope_ascend.py execute    # "" or what was wrong, for each case

Prints JSON. The interpreter is one with triton-ascend: see ascend_offline.py.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace

import ascend_offline
import rope_oracle as oracle
import torch

from ascend_patch.kernels.rope import cases, reference, tiles, triton_call


def every_case() -> dict[str, cases.RopeCase]:
    groups = (cases.correctness_cases, cases.mrope_cases, cases.large_cases, cases.serving_cases)
    return {str(case): case for group in groups for case in group() if case.cache_dtype}


def prepare(case: cases.RopeCase, call: tuple, in_place: bool) -> tuple:
    """(plan, values, constants) as the launcher makes them on an NPU."""
    _, query, key, _ = call
    out = query.new_empty(query.shape), None if key is None else key.new_empty(key.shape)
    out = (query, key) if in_place else out
    heads = case.query_heads, case.key_heads or 0
    plan = tiles.ascend_tiles(
        *heads, case.head_size, case.rotary_dim, query.element_size(), case.is_neox_style
    )
    assert plan is not None
    whole = (*out, *call, *case.options.values())
    return plan, *triton_call.arguments(case.tokens, plan, *whole), out


def row(case: cases.RopeCase, in_place: bool) -> dict[str, object]:
    """Compile, and count: bytes through global memory by what the program loads and stores."""
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    small = replace(case, tokens=min(case.tokens, 2), max_position=2)
    call = cases.make_inputs(small, 0)
    plan, values, constants, _ = prepare(small, call, in_place)
    compiled = ascend_offline.compile_kernel(rotary_kernel, values, constants)
    itemsize = call[1].element_size()
    heads = case.query_heads + (case.key_heads or 0)
    width = case.rotary_dim if in_place else case.head_size
    rows = 3 if constants["MROPE"] else 1
    angles = case.rotary_dim * call[3].element_size()
    position = call[0].element_size()
    least = 2 * heads * width * itemsize + angles + rows * position
    moved = least + (rows - 1) * angles
    return {
        "launches": min(case.tokens, 1),
        "bytes_moved": case.tokens * moved,
        "bytes_least": case.tokens * least,
        "buffer": ascend_offline.unified_buffer(compiled),
        "bound": tiles.unified_buffer_bytes(
            plan,
            case.head_size - case.rotary_dim,
            itemsize,
            case.is_neox_style,
            bool(constants["COPY_REST"]),
        ),
        "tiles": f"{plan.query_tile}/{plan.key_tile}",
    }


def compile_all() -> Iterator[tuple[str, object]]:
    known: dict[object, dict[str, object]] = {}
    for name, case in every_case().items():
        for in_place in (False, True):
            # Tokens and how positions are drawn are no part of what is compiled.
            key = replace(case, tokens=2, positions="sorted", max_position=2, name=""), in_place
            if key not in known:
                known[key] = row(replace(case, tokens=1), in_place)
            one = dict(known[key])
            for field in ("launches", "bytes_moved", "bytes_least"):
                count = case.tokens if field != "launches" else min(case.tokens, 1)
                one[field] = int(str(one[field])) * count
            yield f"{name}{'-in-place' if in_place else ''}", one


def spread() -> list[cases.RopeCase]:
    """Each style, dtype and head size of the grid at least once, and MRoPE's sections."""
    chosen = cases.correctness_cases()[::5] + cases.mrope_cases()[::3]
    return [replace(case, tokens=min(case.tokens, 7)) for case in chosen if case.tokens]


def run(case: cases.RopeCase, in_place: bool, tools) -> None:
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    call = positions, query, key, cache = cases.make_inputs(case, 3)
    before = query.clone(), None if key is None else key.clone()
    plan, values, constants, out = prepare(case, call, in_place)
    if not in_place:
        for x in filter(lambda x: x is not None, out):
            x.fill_(float("nan"))
    compiled = ascend_offline.compile_kernel(rotary_kernel, values, constants)
    function = ascend_offline.build(compiled, "rotary_kernel", tools)
    heads = constants["QUERY_HEADS"], constants["KEY_HEADS"]
    grid = tiles.grid(plan, case.tokens, *heads, 3)
    ascend_offline.execute(function, (*grid, 1), values)
    phase = oracle.phases(positions, cache, case.mrope_section, case.mrope_interleaved)
    for got, x in zip(out, before, strict=True):
        if x is not None:
            oracle.assert_close(got, oracle.rotate(x, phase, case.head_size, case.is_neox_style))
    want = before[0].new_empty(query.shape), None if key is None else key.new_empty(key.shape)
    reference.rotary_embedding_into(*want, positions, *before, cache, *case.options.values())
    for got, x in zip(out, want, strict=True):
        if x is not None:
            rest = slice(case.rotary_dim, None)
            split = (case.tokens, -1, case.head_size)
            same = got.reshape(split)[..., rest], x.reshape(split)[..., rest]
            assert torch.equal(*same), "elements past rotary_dim changed"


def execute_spread(tools) -> Iterator[tuple[str, object]]:
    for n, case in enumerate(spread()):
        try:
            run(case, n % 3 == 2, tools)
            yield str(case), ""
        except Exception:
            yield str(case), traceback.format_exc(limit=-2)[-1500:]


if __name__ == "__main__":
    folder = ascend_offline.activate()
    results = compile_all() if sys.argv[1] == "compile" else execute_spread(folder)
    print(json.dumps(dict(results)))
