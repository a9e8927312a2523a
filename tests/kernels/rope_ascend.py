"""Compile every case for Ascend, execute a spread on x86; run by test_rope_ascend.py.

    python tests/kernels/rope_ascend.py compile    # a row for each case: tiles, buffer, bound
    python tests/kernels/rope_ascend.py count      # the same for bytes through global memory
    python tests/kernels/rope_ascend.py execute    # "" or what was wrong, for each of a spread

An argument after that is part of the name of the cases to take. Prints JSON. The interpreter is one
with triton-ascend: see ascend_offline.py. Results are kept on disk (ascend_store.py), by the
sources that they come from.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import ascend_offline
import ascend_store
import torch
from ascend_calls import Call, Entry, every_case

# Vector cores of an Ascend910B3: so many programs run, each over every n-th token.
CORES = 40
HERE = Path(__file__).resolve().parent
SOURCES = [*HERE.glob("*.py"), *(HERE.parents[1] / "kernels").rglob("*.py")]


def fingerprint(call: Call) -> str:
    """Of all that the compiler is given, but for the processor, and of the compiler."""
    kinds = []
    for value in call.values:
        if isinstance(value, torch.Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            kinds.append((value == 1, value % 16 == 0))
        else:
            kinds.append(type(value))
    tool = (HERE / "ascend_offline.py").read_text()
    of_kernel = (call.kernel.cache_key, sorted(call.constants.items()))
    return ascend_store.digest(*of_kernel, kinds, tool, ascend_offline.versions())


def compiled_row(entry: Entry) -> dict[str, object]:
    call = entry.make(1, 0)
    key = ascend_store.digest("compile", fingerprint(call), ascend_offline.ARCHITECTURE)

    def make() -> int:
        compiled = ascend_offline.compile_kernel(call.kernel, call.values, call.constants)
        return ascend_offline.unified_buffer(compiled)

    used = ascend_store.remember(key, make)
    tile = f"{call.plan.query_tile}/{call.plan.key_tile}"
    return {"buffer": used, "bound": call.bound, "tiles": tile}


def counted_row(entry: Entry, tools: Path) -> dict[str, object]:
    """Bytes of all tokens, from the lowered kernel run over a few of them and over twice that."""
    few, more = entry.make(1, 0), entry.make(2, 0)
    if few.tokens == more.tokens:
        more = entry.make(2 * few.tokens, 0)

    def make() -> list[tuple[int, int]]:
        compiled = ascend_offline.compile_kernel(more.kernel, more.values, more.constants)
        library = ascend_offline.build(compiled, tools)
        runs = ((call.kernel, (1, 1, 1), call.values) for call in (few, more))
        return [ascend_offline.execute(library, *run) for run in runs]

    key = ascend_store.digest("count", fingerprint(more), few.tokens, more.tokens)
    first, second = ascend_store.remember(key, make)
    programs, parts, _ = entry.make(entry.tokens, 0).grid(CORES) if entry.tokens else (0, 0, 0)
    moved = []
    for at_few, at_more in zip(first, second, strict=True):
        each, odd = divmod(at_more - at_few, more.tokens - few.tokens)
        assert not odd, "the bytes do not grow with the tokens"
        # What a program reads but once, whatever the tokens.
        moved.append(each * entry.tokens + (at_few - each * few.tokens) * programs)
    return {
        "launches": min(entry.tokens, 1),
        "programs": programs * parts,
        "read": moved[0],
        "written": moved[1],
        "least": entry.make(entry.tokens, 0).least,
    }


def rows(mode: str, part: str, tools: Path) -> Iterator[tuple[str, object]]:
    known: dict[object, dict[str, object]] = {}
    for entry in every_case():
        if part not in entry.title:
            continue
        if mode == "count":
            yield entry.title, counted_row(entry, tools)
            continue
        if entry.key not in known:
            known[entry.key] = compiled_row(entry)
        yield entry.title, known[entry.key]


def spread() -> Iterator[Entry]:
    """Of each operator every n-th case, so that styles, dtypes, sizes and sections are met."""
    steps = {"rotary_embedding": 6, "rotary_embedding_": 11}
    steps |= {"split_qkv_rmsnorm_rope": 3, "apply_rotary": 3}
    met = dict.fromkeys(steps, 0)
    for entry in every_case():
        if entry.tokens:
            met[entry.operator] += 1
            if met[entry.operator] % steps[entry.operator] == 1:
                yield entry


def execute(entry: Entry, tools: Path) -> str:
    """Run the lowered kernel as three programs, and have the oracle judge; what it says."""
    call = entry.make(min(entry.tokens, 7), 3)
    compiled = ascend_offline.compile_kernel(call.kernel, call.values, call.constants)
    library = ascend_offline.build(compiled, tools)
    ascend_offline.execute(library, call.kernel, call.grid(3), call.values)
    call.judge()
    return ""


def execute_spread(part: str, tools: Path) -> Iterator[tuple[str, object]]:
    sources = ascend_store.digest_of_files(SOURCES)
    for entry in spread():
        if part not in entry.title:
            continue
        key = ascend_store.digest("execute", sources, ascend_offline.versions(), entry.title)
        try:
            found = ascend_store.remember(key, lambda e=entry: execute(e, tools))
        except Exception:
            found = traceback.format_exc(limit=-2)[-1500:]
        yield entry.title, found


def main(mode: str, part: str = "") -> None:
    tools = ascend_offline.activate()
    found = execute_spread(part, tools) if mode == "execute" else rows(mode, part, tools)
    print(json.dumps({"versions": ascend_offline.versions(), "rows": dict(found)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
