"""docs/ascend/rope.csv and rope.md: what the rotary kernels cost on Ascend, without one."""

# Lines of the document are as long as its editor shows them.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from _ascend_found import ARCHITECTURES, UNIFIED_BUFFER, found, write

COUNTED = ("launches", "programs", "read", "written", "least")

TEXT = """\
# Rotary kernels on Ascend, by their lowered form

Written by `scripts/ascend_table`, with {versions}; no NPU took part.
`rope.csv` has a row for each operator and case of kernels/rope (`cases.py`, `fused_cases.py`,
`angles_cases.py`):

- `launches`, `programs`: of a call, on 40 vector cores (Ascend910B3). A program takes every n-th
  token, in rounds of equal length.
- `read`, `written`: bytes through global memory, counted while the kernel that the compiler lowered
  to linalg runs on x86, masks and loops included; `least`: every byte of the inputs that the call
  needs, once a token (angles and positions) or once a call (weights), and every byte of the results.
- `tiles`: heads of query and of key and value that are held at a time.
- `buffer_*`: bytes of unified buffer that the compiler planned, for each processor; 196608 is all.

| operator | cases | launches | moved / least: median | worst | unified buffer: most | headroom |
|---|---|---|---|---|---|---|
{summary}

{processors}

Most moved over the least:

| operator | case | moved / least |
|---|---|---|
{worst}

MRoPE reads three whole rows of angles where a token needs one: a mask with holes would be a gather,
which Ascend's vector cores have not. A program of the fused kernel reads its weights once, so a call
reads them at most 40 times. apply_rotary with angles shared by a batch reads them for each entry.
"""


def rows() -> list[dict[str, object]]:
    """The table; a row for each operator and case."""
    compiled = {a: found("rope_ascend.py", "compile", architecture=a) for a in ARCHITECTURES}
    counted = found("rope_ascend.py", "count")
    table = []
    for name, counts in counted["rows"].items():
        operator, case = name.split(" ", 1)
        one = compiled["Ascend910B3"]["rows"][name]
        row = {"operator": operator, "case": case, **{field: counts[field] for field in COUNTED}}
        row["tiles"] = one["tiles"]
        row |= {f"buffer_{a}": compiled[a]["rows"][name]["buffer"] for a in ARCHITECTURES}
        table.append({**row, "compiler": counted["versions"]})
    return table


def ratio(row: dict[str, object]) -> float:
    return (int(row["read"]) + int(row["written"])) / int(row["least"])


def buffer(row: dict[str, object]) -> int:
    return max(int(row[f"buffer_{a}"]) for a in ARCHITECTURES)


def summary(table: list[dict[str, object]]) -> Iterable[str]:
    for operator in dict.fromkeys(row["operator"] for row in table):
        here = [row for row in table if row["operator"] == operator]
        ratios = [ratio(row) for row in here if row["least"]]
        most = max(map(buffer, here))
        yield (
            f"| {operator} | {len(here)} | {max(row['launches'] for row in here)} "
            f"| {median(ratios):.3f} | {max(ratios):.3f} | {most / 1024:.1f} KiB "
            f"| {(UNIFIED_BUFFER - most) / 1024:.1f} KiB |"
        )


def processors(table: list[dict[str, object]]) -> str:
    differ = [r for r in table if len({r[f"buffer_{a}"] for a in ARCHITECTURES}) > 1]
    names = ", ".join(ARCHITECTURES)
    if not differ:
        return f"The planned buffers are the same for {names} in every case."
    return f"The planned buffers of {names} differ in {len(differ)} cases."


def text(table: list[dict[str, object]]) -> str:
    worst = sorted((row for row in table if row["least"]), key=ratio, reverse=True)[:8]
    return TEXT.format(
        versions=table[0]["compiler"],
        summary="\n".join(summary(table)),
        processors=processors(table),
        worst="\n".join(f"| {r['operator']} | {r['case']} | {ratio(r):.3f} |" for r in worst),
    )


def main() -> None:
    table = rows()
    write("rope", table, text(table))
