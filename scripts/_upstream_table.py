"""Two runs of the same tests beside each other: what differs, and tables of it."""

from __future__ import annotations

import datetime
import subprocess
from collections import Counter
from dataclasses import dataclass

import _env
from _upstream_run import Run

OUTCOMES = ("passed", "failed", "skipped", "xfailed", "xpassed", "none")
HEAD = ("file", "tests", "unpatched", "patched", "tests that reached us", "calls")


@dataclass(frozen=True)
class Row:
    """A file of tests. Outcomes are counted as in `OUTCOMES`."""

    file: str
    stock: Counter[str]
    patched: Counter[str]
    reached: int
    calls: int

    def cells(self) -> tuple[str, ...]:
        stock, patched = _outcomes(self.stock), _outcomes(self.patched)
        tests = str(self.stock.total())
        return self.file, tests, stock, patched, str(self.reached), str(self.calls)


@dataclass(frozen=True)
class Found:
    """An area of a release's tests, run unpatched and patched.

    Attributes:
        runs: `stock` and `patched`.
        explained: What differs and is meant to, by test or a part of its id.
    """

    host: str
    release: str
    area: str
    runs: dict[str, Run]
    explained: dict[str, str]

    @property
    def stock(self) -> Run:
        return self.runs["stock"]

    @property
    def patched(self) -> Run:
        return self.runs["patched"]

    def rows(self) -> list[Row]:
        """Every file in which a test ran."""
        files = dict.fromkeys(test.partition("::")[0] for test in self._tests())
        rows = []
        for file in files:
            tests = [test for test in self._tests() if test.partition("::")[0] == file]
            calls = [self.patched.calls(test).total() for test in tests]
            stock, patched = (
                Counter(run.tests[test]["outcome"] for test in tests if test in run.tests)
                for run in (self.stock, self.patched)
            )
            rows.append(Row(file, stock, patched, sum(map(bool, calls)), sum(calls)))
        return rows

    def differences(self) -> dict[str, str]:
        """Tests that end otherwise than unpatched, and how."""
        found = {}
        for test in self._tests():
            stock, patched = (_ending(run, test) for run in (self.stock, self.patched))
            if stock != patched:
                found[test] = f"{stock} unpatched, {patched} patched"
        return found

    def reason(self, test: str) -> str:
        """Why a test may end otherwise; empty where it may not."""
        return next((why for part, why in self.explained.items() if part in test), "")

    def problems(self) -> list[str]:
        """What nobody has explained, as sentences."""
        where = f"{self.host} {self.release}, {self.area}"
        found = [
            f"{where}: {name} did not end; its last test is in the log above"
            for name, run in self.runs.items()
            if not run.ended
        ]
        for test, how in self.differences().items():
            if not self.reason(test):
                found.append(f"{where}: {test}: {how}")
        for part in self.explained:
            ran = any(part in test for test in self._tests())
            if ran and not any(part in test for test in self.differences()):
                found.append(f"{where}: {part} ends as it does unpatched; it is explained no more")
        for file, why in self.patched.uncollected.items():
            if self.stock.uncollected.get(file) != why:
                found.append(f"{where}: {file} could not be collected patched: {why}")
        for patch in self.patched.status.get("patches", []):
            if patch["state"] == "failed":
                found.append(f"{where}: patch {patch['id']} failed: {patch['reason']}")
        found += [f"{where}: {text}" for text in self.patched.status.get("problems", [])]
        if not self.patched.status:
            found.append(f"{where}: the shim was not armed in the patched run")
        return found

    def lines(self) -> list[str]:
        """A table for a terminal, and what is to be said about it."""
        cells = [HEAD, *(row.cells() for row in self.rows())]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        lines += [f"not collected: {file}: {why}" for file, why in self.stock.uncollected.items()]
        for test, how in self.differences().items():
            lines.append(f"differs: {test}: {how}. {self.reason(test) or 'Not explained.'}")
        lines.append(f"targets reached: {_names(self.targets())}")
        return lines

    def targets(self) -> Counter[str]:
        """Calls to each target and kernel of ours, of all tests."""
        found: Counter[str] = Counter()
        for test in self._tests():
            found += self.patched.calls(test)
        return found

    def _tests(self) -> list[str]:
        return list(dict.fromkeys([*self.stock.tests, *self.patched.tests]))


def summary(found: list[Found]) -> str:
    """One line."""
    rows = [row for one in found for row in one.rows()]
    tests = sum((row.stock for row in rows), Counter())
    reached = sum(row.reached for row in rows)
    differs = sum(len(one.differences()) for one in found)
    unexplained = sum(len(one.problems()) for one in found)
    return (
        f"{tests.total()} tests of {len(rows)} files ({_outcomes(tests)} unpatched); "
        f"{reached} reached our code by {sum(row.calls for row in rows)} calls; "
        f"{differs} end otherwise, {unexplained} problems"
    )


def document(found: list[Found]) -> str:
    """docs/upstream_tests.md."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# The hosts' own tests, with the patches and without",
        "",
        f"Written by `scripts/upstream_tests --write` on {today} at commit {_commit()}.",
        "",
        "Tests of vLLM's and vllm-ascend's source distributions that are near to the four patches "
        "and run",
        "without an accelerator: each area in one process unpatched and in one with",
        "`ASCEND_PATCHES=all` through sitecustomize. A test that reached no code of ours says",
        "nothing about it, so those that did are counted. Many of them fail unpatched, here and "
        "without",
        "us: they need a GPU, models of the hub, or are behind their release; they must fail in "
        "the same",
        "way.",
        "",
        f"{summary(found)}.",
    ]
    for one in found:
        lines += ["", f"## {one.host} {one.release}, {one.area}", ""]
        counted = [row for row in one.rows() if row.calls]
        others = [row for row in one.rows() if not row.calls]
        if counted:
            lines += [_markdown(HEAD), _markdown(["---"] * len(HEAD))]
            lines += [_markdown(row.cells()) for row in counted]
            lines += ["", f"Reached: {_names(one.targets(), '`')}."]
        if others:
            tests = sum((row.stock for row in others), Counter())
            lines += ["", f"No call in {tests.total()} tests ({_outcomes(tests)}) of:"]
            lines += [f"- `{row.file}`" for row in others]
        for file, why in one.stock.uncollected.items():
            lines += ["", f"Not collected, patched or not: `{file}` ({why})"]
        for test, how in one.differences().items():
            lines += ["", f"Differs: `{test}`: {how}. {one.reason(test) or 'Not explained.'}"]
    return "\n".join(lines) + "\n"


def _ending(run: Run, test: str) -> str:
    """How a test ended, and how it failed."""
    found = run.tests.get(test)
    if found is None:
        return "not run"
    return f"{found['outcome']} ({found['why']})" if found["why"] else found["outcome"]


def _outcomes(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name]) or "none"


def _names(calls: Counter[str], quote: str = "") -> str:
    found = [
        f"{quote}{name.rpartition(':')[2] or name}{quote} {count}"
        for name, count in calls.most_common()
    ]
    return ", ".join(found) or "none"


def _markdown(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _commit() -> str:
    """The commit, and whether our code differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(_env.CHECKOUT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    ours = git("status", "--porcelain", "--untracked-files=no", "--", *_env.SHIM_SOURCES)
    return git("rev-parse", "--short", "HEAD") + (" with changes" if ours else "")
