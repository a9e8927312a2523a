"""The plots of scripts/bench gdn, drawn from its CSV files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from _pictures import can_draw

FACTS = ("device", "torch", "triton", "commit")
LONG = ("1x2048", "1x8192", "1x32768")
COLOURS = {"host": "tab:blue", "device": "tab:green", "queued": "lightgrey"}


def write(folder: Path) -> None:
    """A picture of each CSV file in ``folder``; a line where there is no matplotlib."""
    if not can_draw():
        return
    for name, draw in (("gdn", times), ("gdn_timeline", timeline)):
        if (folder / f"{name}.csv").exists():
            with (folder / f"{name}.csv").open() as file:
                draw(list(csv.DictReader(file))).savefig(folder / f"{name}.png", dpi=110)


def times(rows: list[dict[str, str]]) -> Any:
    """Time over the tokens of one prompt, a panel for each number of heads."""
    from matplotlib import pyplot

    ranks = sorted({int(row["tp"]) for row in rows})
    figure, panels = pyplot.subplots(1, len(ranks), figsize=(4.2 * len(ranks), 4), squeeze=False)
    for panel, tp in zip(panels[0], ranks, strict=True):
        here = [r for r in rows if int(r["tp"]) == tp and r["case"] in LONG]
        for what in dict.fromkeys(r["what"] for r in here):
            points = sorted(
                (int(r["tokens"]), float(r["p50_ms"])) for r in here if r["what"] == what
            )
            style = "k--" if what == "floor" else "-"
            panel.plot(*zip(*points, strict=True), style, marker=".", label=what)
        ticks = sorted({int(r["tokens"]) for r in here})
        panel.set(xscale="log", yscale="log", xlabel="tokens of one prompt", title=f"TP {tp}")
        panel.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms a call (p50)")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle("gated delta rule, prefill: " + facts(rows[0]))
    figure.tight_layout()
    return figure


def timeline(spans: list[dict[str, str]]) -> Any:
    """Host and device in a step's calls, before and after."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(span["what"] for span in spans))
    figure, panels = pyplot.subplots(len(names), 1, figsize=(10, 1.8 * len(names)), squeeze=False)
    end = max(float(span["end_ms"]) for span in spans)
    for panel, what in zip(panels[:, 0], names, strict=True):
        for span in (s for s in spans if s["what"] == what):
            begin, width = float(span["begin_ms"]), float(span["end_ms"]) - float(span["begin_ms"])
            level = 1 if span["row"] == "host" else 0
            panel.barh(level, width, left=begin, color=COLOURS[span["row"]], edgecolor="black")
        panel.set(yticks=(0, 1), yticklabels=("device", "host"), xlim=(0, end), title=what)
    panels[-1][0].set_xlabel("ms; grey: work that was queued before")
    figure.suptitle("three layers' calls in one step: " + facts(spans[0]))
    figure.tight_layout()
    return figure


def facts(row: dict[str, str]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in FACTS)
