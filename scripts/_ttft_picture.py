"""The plot of scripts/bench kv ttft, drawn from its CSV file."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

from _pictures import can_draw

FACTS = ("device", "cpu", "vllm", "torch", "mooncake", "commit")
COLOURS = {"pair": "tab:blue", "pair, unpatched": "tab:orange", "prefill alone": "tab:green"}
COLOURS |= {"decode alone": "tab:grey"}


def write(folder: Path) -> None:
    """Draw kv_ttft.csv of `folder` beside it; a line where there is no matplotlib."""
    if not can_draw():
        return
    with (folder / "kv_ttft.csv").open() as file:
        rows = list(csv.DictReader(file))
    draw(rows).savefig(folder / "kv_ttft.png", dpi=110)


def draw(rows: list[dict[str, str]]) -> Any:
    """TTFT over KV bytes: a row of panels for each layout, one panel for each ratio."""
    from matplotlib import pyplot

    ratios = list(dict.fromkeys((row["prefill_tp"], row["decode_tp"]) for row in rows))
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    size = (4.4 * len(ratios), 3.6 * len(layouts) + 0.6)
    figure, panels = pyplot.subplots(len(layouts), len(ratios), figsize=size, squeeze=False)
    for line, layout in zip(panels, layouts, strict=True):
        for panel, (prefill, decode) in zip(line, ratios, strict=True):
            here = [r for r in rows if r["layout"] == layout]
            here = [r for r in here if (r["prefill_tp"], r["decode_tp"]) == (prefill, decode)]
            panel.set_visible(bool(here))
            curves(panel, here)
            panel.set(title=f"TP {prefill} -> {decode}, {layout}", xscale="log", yscale="log")
            panel.set_xlabel("MiB of KV, whole blocks")
            ticks = sorted({int(row["kv_bytes"]) / 2**20 for row in here})
            panel.set_xticks(ticks, [f"{one:g}" for one in ticks], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("ms to the first token, median and quartiles")
    shown = {}
    for panel in panels.flat:
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    panels[0][-1].legend(shown.values(), shown.keys(), fontsize=8)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    words = [f"{name} {rows[0][name]}" for name in FACTS[1:-1]]
    title = ", ".join(["KV over Mooncake's TCP", rows[0]["device"], *words, f"commit {commits}"])
    figure.suptitle("\n".join(textwrap.wrap(title, 30 * len(ratios) + 20)), fontsize=10)
    figure.tight_layout()
    return figure


def curves(panel: Any, rows: list[dict[str, str]]) -> None:
    """What was asked of one pair of servers."""
    for what in dict.fromkeys(row["what"] for row in rows):
        points = sorted(
            [float(row[name]) for name in ("kv_bytes", "ttft_ms", "q1_ms", "q3_ms")]
            for row in rows
            if row["what"] == what
        )
        size, middle, low, high = zip(*points, strict=True)
        spread = [
            [m - q for m, q in zip(middle, low, strict=True)],
            [q - m for m, q in zip(middle, high, strict=True)],
        ]
        style = "--" if what.endswith("alone") else "-"
        mib = [one / 2**20 for one in size]
        panel.errorbar(mib, middle, spread, color=COLOURS[what], ls=style, marker=".", label=what)
