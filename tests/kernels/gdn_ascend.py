"""chunk_gated_delta_rule compiled for Ascend, executed on x86, counted; run by test_gdn_ascend.py.

    python tests/kernels/gdn_ascend.py compile [PART]   # what each launch of each case takes
    python tests/kernels/gdn_ascend.py execute SEED     # relative errors of each of a spread
    python tests/kernels/gdn_ascend.py score [PART]     # the static score of ours, by case
    python tests/kernels/gdn_ascend.py rival SOURCE     # the same of vllm-ascend's own kernels

PART is part of the name of the cases to take, SOURCE a checkout of vllm-ascend 0.18.0. Prints JSON.
The interpreter is one with triton-ascend: see ascend_offline.py. Results are kept on disk
(ascend_store.py), by the sources that they come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ascend_hivm
import ascend_offline
import ascend_store
import torch
from gdn_ascend_calls import Launch, least, make_call, ours, theirs
from gdn_judge import relative

from ascend_patch.kernels.gdn import cases, oracle

HERE = Path(__file__).resolve().parent
SPACES = {"unified_buffer": "ub", "l1": "cbuf", "l0c": "cc"}
EXECUTED = (
    cases.ChunkCase((70, 0, 64), 1, 2, 64, 64, sliced=True, tail=2),
    cases.ChunkCase((1, 0, 65), 2, 2, 64, 64, "float16", "KV", "initial", decay=20.0),
    cases.ChunkCase((63,), 1, 1, 128, 64, states="none", normalise=False),
    cases.ChunkCase((65, 3, 2), 1, 3, 64, 128, "float16", state_dtype="bfloat16", decay=1e-4),
    cases.ChunkCase((127,), 1, 1, 128, 128, layout="KV", state_dtype="bfloat16"),
    cases.ChunkCase((0, 0), 1, 2, 64, 64),
)


def fingerprint(launch: Launch) -> str:
    """Of all that the compiler is given, and of the compiler."""
    kinds: list[object] = []
    plain: dict[str, object] = {}
    for name, value in launch.given.items():
        if isinstance(value, torch.Tensor):
            kinds.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not isinstance(value, bool) and name.islower():
            kinds.append((name, value == 1, value % 16 == 0))
        else:
            plain[name] = value
    names = ("ascend_offline.py", "ascend_hivm.py", "ascend_hivm_ops.py")
    tools = [(HERE / name).read_text() for name in names]
    kernel = launch.jit
    about = kernel.cache_key, sorted(plain.items(), key=str), kinds
    return ascend_store.digest(
        *about, *tools, ascend_offline.versions(), ascend_offline.ARCHITECTURE
    )


def hivm(compiled: Any) -> str:
    text = compiled.asm["npubin"]
    return text.decode() if isinstance(text, bytes) else str(text)


def compiled_cases() -> list[cases.ChunkCase]:
    """Sizes, layouts, states and dtypes; heads and lengths are a model's."""
    shape: dict[str, Any] = {"lengths": (200, 1), "key_heads": 4, "value_heads": 8, "tail": 0}
    found = [replace(case, **shape) for case in cases.correctness_cases()]
    return list(dict.fromkeys([*found, *(replace(c, name="") for c in cases.serving_cases()[::6])]))


def memories(launch: Launch) -> dict[str, int]:
    def make() -> dict[str, int]:
        text = hivm(launch.compile())
        return {name: ascend_hivm.planned(text, space) for name, space in SPACES.items()}

    key = ascend_store.digest("gdn memories", fingerprint(launch))
    return dict(ascend_store.remember(key, make))


def compile_rows(part: str) -> Iterator[tuple[str, object]]:
    for case in compiled_cases():
        if part in str(case):
            for launch in ours(make_call(case)):
                yield f"{launch.name} {case}", memories(launch)


def score(launches: list[Launch]) -> list[dict[str, object]]:
    """What each launch moves and computes, all programs together."""
    rows = []
    for launch in launches:

        def make(launch: Launch = launch) -> dict[str, object]:
            text = hivm(launch.compile())
            found = ascend_hivm.count(text, launch.arguments(), launch.grid)
            read, written = found.moved(workspace=False)
            handed = found.moved(workspace=True)
            return {
                "read": read,
                "written": written,
                "workspace_read": handed[0],
                "workspace_written": handed[1],
                "products": found.products,
                "elements": found.elements,
                "waits": found.waits,
                "mixed": "func_core_type<AIC>" in text,
                **{name: ascend_hivm.planned(text, space) for name, space in SPACES.items()},
            }

        ints = [x for x in launch.arguments() if isinstance(x, (int, tuple))]
        key = ascend_store.digest("gdn score", fingerprint(launch), launch.grid, ints)
        programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        row = {"kernel": launch.name, "programs": programs}
        rows.append(row | ascend_store.remember(key, make))
    return rows


def score_rows(part: str) -> Iterator[tuple[str, object]]:
    for case in cases.serving_cases():
        if part in str(case):
            call = make_call(case)
            yield str(case), {"least": least(call), "launches": score(ours(call)), "copies": [0, 0]}


def rival_rows(source: str) -> Iterator[tuple[str, object]]:
    for case in cases.serving_cases():
        launches, copies = theirs(case, Path(source))
        made = {"launches": score(launches), "copies": [copies.operators, copies.bytes]}
        yield str(case), {"least": least(make_call(case)), **made}


def execute(case: cases.ChunkCase, seed: int, tools: Path) -> tuple[float, float]:
    """Run the lowered kernels as three programs; relative errors of outputs and final states."""
    call = make_call(case, seed, "cpu")
    held = None if call.initial is None else call.initial.clone()
    for launch in ours(call, 3):
        library = ascend_offline.build(launch.compile(), tools)
        values = [launch.given[p.name] for p in launch.jit.params if not p.is_constexpr]
        ascend_offline.execute(library, launch.jit, launch.grid, values)
    wanted, states, kept = oracle.recurrence(cases.make_inputs(case, seed))
    used = len(wanted)
    assert bool(call.out[used:].isnan().all()), "tokens of no sequence were written"
    assert call.final is not None
    final = call.final
    if call.state_indices is not None:
        slots = call.state_indices.long()[kept]
        others = torch.ones(len(final), dtype=torch.bool)
        others[slots] = False
        assert held is not None
        assert torch.equal(final[others], held[others]), "another slot was written"
        final, states = final[slots], states[kept]
    final = final if case.layout == "KV" else final.transpose(-1, -2)
    pairs = (call.out[:used], wanted), (final, states)
    outs, ends = (relative(got.double().numpy(), want.numpy()) for got, want in pairs)
    return outs, ends


def main(mode: str, argument: str = "") -> None:
    tools = ascend_offline.activate()
    modes: dict[str, Callable[[str], Iterator[tuple[str, object]]]] = {
        "compile": compile_rows,
        "score": score_rows,
        "rival": rival_rows,
        "execute": lambda seed: ((str(c), execute(c, int(seed), tools)) for c in EXECUTED),
    }
    print(json.dumps({"versions": ascend_offline.versions(), "rows": dict(modes[mode](argument))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
