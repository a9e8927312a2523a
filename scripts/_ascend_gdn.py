"""docs/ascend/gdn.csv and gdn.md: what the gated delta rule costs on Ascend, without one."""

# Lines of the document are as long as its editor shows them.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _ascend_found import ARCHITECTURES, UNIFIED_BUFFER, committed, found, write

OURS, THEIRS = "ours", "vllm-ascend 0.18.0"
CHUNKED, COPIES = "chunk_gated_delta_rule", "torch copies"
MOVED = ("read", "written", "workspace_read", "workspace_written")
WORK = ("products", "elements", "waits")
MEMORIES = {"unified_buffer": UNIFIED_BUFFER, "l1": 512 * 1024, "l0c": 128 * 1024}
# Compiled on each processor; on the first of all, all shapes are.
EVERYWHERE = "K128V128-KV"

TEXT = """\
# The chunked gated delta rule on Ascend, by its compiled form

Written by `scripts/ascend_table`, with {versions}; no NPU took part. `gdn.csv` has a row for each
launch of each case of `kernels/gdn/cases.py: serving_cases`: Qwen3-Next's layers (16 key heads, 32
value heads of 128, bfloat16) on a rank of 1, 2, 4 or 8, ours and those of vllm-ascend 0.18.0
(`vllm_ascend/ops/triton/fla`, launched by its own host code). Both are compiled by the same offline
compiler for an Ascend910B3, and their compiled form (HIVM) is run without its data, every program
of a launch on 20 cube and 40 vector cores (tests/kernels/ascend_hivm.py):

- `read`, `written`: bytes of tensors, what one launch leaves for the next included. `least`: inputs
  and outputs once, a state in and out.
- `workspace_*`: bytes that cube and vector cores hand each other. On these processors that goes
  through global memory too, mostly its cache.
- `products`: floating-point operations of cube cores. `elements`: results of vector operations,
  of both vector cores of a block; where the compiler cannot halve a tile, both compute all of it.
- `waits`: of cube cores for vector cores or the other way, in all programs together.
- `unified_buffer`, `l1`, `l0c`: bytes that the compiler planned; it uses what there is for double
  buffering, and says so where something does not fit.
- `torch copies`: what vllm-ascend's host code has torch make contiguous in between; its layer's
  gather and scatter of states, which ours does without, are not counted.

## Of one call

| case | launches | tensors, MB | / least | workspace, MB | products, G | elements, M | waits, k |
|---|---|---|---|---|---|---|---|
{calls}

Each field is ours, then vllm-ascend's.

## Of each launch, 1x8192 on one rank

| kernel | programs | tensors, MB | workspace, MB | products, G | elements, M | UB free, KiB | L1 free | L0C free |
|---|---|---|---|---|---|---|---|---|
{launches}

{processors}

## The layers' other kernels

Vector cores alone. A prefill of 8192 tokens, a decode step of so many requests.

| case | kernel | programs | tensors, MB | / least | elements, M | UB free, KiB |
|---|---|---|---|---|---|---|
{others}

## What this says, and what it does not

Of tensors, ours moves less in most cases: keys are not normalised into copies, the system of a chunk
and its inverse are never written, the state before each chunk is not stored, and a cache is read and
written where it is. Where few heads are left on a rank and there is one prompt, a state is parted so
that more cores than heads have work, and each part reads q, k, w and p again: there ours moves more,
over 16 or 20 programs where vllm-ascend's two last launches have one for each head.

Between cube and vector cores ours moves half as much again. The inverse of a chunk is fifteen
products of 64 x 64 (five by the identity, which spares the vector cores), one after the other, and
each goes through the workspace; vllm-ascend inverts blocks of 16 on vector cores, row by row, and
has six smaller products. The compiler stores a tile once for each product that it is a factor of,
and in the first launch both vector cores of a block compute and store the same. Vector work is
about as much, but for short prompts, where vllm-ascend's blocks of 1216 tokens are mostly empty.
Nothing here is a time: that needs an NPU.

What the compiler refuses, and the kernels therefore do not do:

- A vector that is both a column and a row of matrices lies 32 bytes apart, and each matrix it meets
  takes eight times its room: 1.2 MB of unified buffer where 192 KiB are. So sums are taken twice.
- A state that is read across its rows takes eight times its room as well. It is read as it lies and
  turned in the unified buffer.
- A product of a chunk's last rows has only those that are real; the rest of the tile is not written.
  Those rows are masked before they meet another product, where 0 x NaN would be NaN.
- A sum over the rows of a chunk keeps the compiler from halving tiles between the vector cores. The
  second launch has none; in the first the running sum of g is one.
"""


def rows(source: Path | None) -> list[dict[str, object]]:
    """A row for each launch, ours first."""
    sides = [(OURS, found("gdn_ascend.py", "score")), (OURS, found("gdn_ascend_others.py"))]
    if source is not None:
        sides.append((THEIRS, found("gdn_ascend.py", "rival", str(source.resolve()))))
    table: list[dict[str, object]] = []
    for side, result in sides:
        for case, row in result["rows"].items():
            table += _rows_of(side, case, row, str(result["versions"]))
    if source is None:
        table += [dict(row) for row in committed("gdn") if row["of"] == THEIRS]
    return table


def _rows_of(side: str, case: str, row: Any, versions: str) -> Iterable[dict[str, object]]:
    about = {"of": side, "operator": row.get("operator", CHUNKED), "case": case}
    for launch in row["launches"]:
        yield {**about, **launch, "least": row["least"], "compiler": versions}
    operators, moved = row["copies"]
    if operators:
        copied = dict.fromkeys((*MOVED, *WORK, *MEMORIES), 0)
        copied |= {"read": moved // 2, "written": moved // 2}
        named = {"kernel": COPIES, "programs": operators, "mixed": False}
        yield {**about, **named, **copied, "least": row["least"], "compiler": versions}


def text(table: list[dict[str, object]]) -> str:
    """The document of a table."""
    others = [row for row in table if row["operator"] != CHUNKED]
    table = [row for row in table if row["operator"] == CHUNKED]
    cases = list(dict.fromkeys(str(row["case"]) for row in table))
    first = [row for row in table if row["case"] == cases[0]]
    return TEXT.format(
        versions=table[0]["compiler"],
        calls="\n".join(_call(table, case) for case in cases),
        launches="\n".join(_launch(row) for row in first if row["kernel"] != COPIES),
        others="\n".join(map(_other, others)),
        processors=_processors(),
    )


def _sum(rows: Iterable[dict[str, object]], *fields: str) -> float:
    return sum(float(str(row[field])) for row in rows for field in fields)


def _call(table: list[dict[str, object]], case: str) -> str:
    fields: list[list[str]] = [[] for _ in range(7)]
    for side in (OURS, THEIRS):
        here = [row for row in table if row["case"] == case and row["of"] == side]
        if not here:
            continue
        moved, handed = _sum(here, *MOVED[:2]), _sum(here, *MOVED[2:])
        kernels = sum(row["kernel"] != COPIES for row in here)
        copies = sum(int(str(row["programs"])) for row in here if row["kernel"] == COPIES)
        values = (
            f"{kernels}" + (f" and {copies} copies" if copies else ""),
            f"{moved / 1e6:.0f}",
            f"{moved / float(str(here[0]['least'])):.1f}",
            f"{handed / 1e6:.0f}",
            f"{_sum(here, 'products') / 1e9:.1f}",
            f"{_sum(here, 'elements') / 1e6:.0f}",
            f"{_sum(here, 'waits') / 1e3:.0f}",
        )
        for field, value in zip(fields, values, strict=True):
            field.append(value)
    return f"| {case} | " + " | ".join("; ".join(field) for field in fields) + " |"


def _launch(row: dict[str, object]) -> str:
    free = ((room - int(str(row[name]))) / 1024 for name, room in MEMORIES.items())
    return (
        f"| {row['of']}: {row['kernel']} | {row['programs']} "
        f"| {_sum([row], *MOVED[:2]) / 1e6:.0f} | {_sum([row], *MOVED[2:]) / 1e6:.0f} "
        f"| {_sum([row], 'products') / 1e9:.1f} | {_sum([row], 'elements') / 1e6:.0f} "
        f"| {' | '.join(f'{kib:.0f}' for kib in free)} |"
    )


def _other(row: dict[str, object]) -> str:
    moved = _sum([row], *MOVED[:2])
    free = (UNIFIED_BUFFER - int(str(row["unified_buffer"]))) / 1024
    return (
        f"| {row['case']} | {row['kernel']} | {row['programs']} | {moved / 1e6:.2f} "
        f"| {moved / float(str(row['least'])):.3f} | {_sum([row], 'elements') / 1e6:.2f} "
        f"| {free:.0f} |"
    )


def _processors() -> str:
    every = found("gdn_ascend.py", "compile")["rows"]
    most = max(int(row["unified_buffer"]) for row in every.values())  # type: ignore[call-overload, index]
    counted = {
        a: found("gdn_ascend.py", "compile", EVERYWHERE, architecture=a) for a in ARCHITECTURES
    }
    plans = {a: result["rows"] for a, result in counted.items()}
    same = all(plan == plans[ARCHITECTURES[0]] for plan in plans.values())
    return (
        f"Ours compile in every shape and dtype that they take ({len(every)} launches: K and V of 64, "
        f"128 and 256, both layouts, each kind of state), and take {most} of {UNIFIED_BUFFER} bytes "
        f"of unified buffer at most. Planned memories are {'the same' if same else 'not the same'} "
        f"for {', '.join(ARCHITECTURES)}."
    )


def main(source: Path | None) -> None:
    """Write both files."""
    table = rows(source)
    write("gdn", table, text(table))
