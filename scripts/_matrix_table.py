"""The table of scripts/matrix: kept as CSV, shown as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from _matrix_cases import CASES, DEVICES, ITSELF, RELEASES, Result, Seen

VERSIONS = ("vllm", "torch", "transformers", "python")
PLAIN = ("release", "what", "dtype", "verdict", "oracle", "steps", "other_tokens")
NUMBERS = ("worst", "limit", "spoilt")
LAST = ("date", "commit", "seconds", "why", "note")
IMPORTS = "imports, "
# What a server would decide too.
ON_CPU = f"{IMPORTS}cpu"

INTRODUCTION = """\
# Releases and patches, run for real

Written by `scripts/matrix`, from `matrix.csv`. Each release is installed as the index has it, in an
environment of its own, with the shim as pip installs it and `ASCEND_PATCHES=all`; a tiny model with
random weights is served with and without the shim, eagerly, on a CPU.
"""
PATCHES = """\
## What became of each patch

The state in the processes of a server with the named model, and how often vLLM reached what the
patch put in place. *imported*: where no server of a CPU gets there, the modules that the patch
changes were imported and patched, as for the named device, and not run; *in part* where vLLM itself
cannot import one of them here.
"""
ANSWERS = """\
## What the servers said

12 prompts and 16 greedy tokens of each; where the second server would go on otherwise it is asked
again from the first one's tokens, so that every step is compared. *apart*: the largest difference
of a logprob among the 20 likeliest tokens of a step (bfloat16: of a logit). *spoilt*: the same with
the output of our kernel spoilt, of the prompt that shows it least: what the comparison would see.
The oracle is the release's own unpatched server; where there is none, transformers.
"""


def to_csv(results: Iterable[Result]) -> str:
    """Return the rows as CSV; a patch is `state:calls:reason`."""
    ordered = in_order(results)
    names = patch_names(ordered)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*PLAIN, *NUMBERS, *names, *VERSIONS, *LAST])
    for result in ordered:
        row = [getattr(result, name) for name in PLAIN]
        numbers = [getattr(result, name) for name in NUMBERS]
        row += ["" if number is None else f"{number:.2e}" for number in numbers]
        row += [_cell(result, name) for name in names]
        row += [result.versions.get(name, "") for name in VERSIONS]
        row += [getattr(result, name) for name in LAST]
        writer.writerow([without_paths(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def from_csv(text: str) -> list[Result]:
    """Return the rows of a table that was written before."""
    results = []
    fixed = {*PLAIN, *NUMBERS, *VERSIONS, *LAST}
    for row in csv.DictReader(io.StringIO(text)):
        patches = {}
        for name in (name for name in row if name not in fixed and row[name]):
            state, calls, reason = (*row[name].split(":", 2), "", "")[:3]
            patches[name] = Seen(state, reason, int(calls or 0))
        results.append(
            Result(
                **{name: row[name] for name in ("release", "what", "dtype", "verdict", "oracle")},
                **{name: row[name] for name in ("date", "commit", "why", "note")},
                **{name: int(row[name]) for name in ("steps", "other_tokens", "seconds")},
                **{name: float(row[name]) if row[name] else None for name in NUMBERS},
                versions={name: row[name] for name in VERSIONS if row[name]},
                patches=patches,
            )
        )
    return results


def merged(before: Iterable[Result], now: Iterable[Result]) -> list[Result]:
    """Return the rows of a table with those that were run now in their places."""
    rows = {(result.release, result.what): result for result in before}
    rows |= {(result.release, result.what): result for result in now}
    return in_order(rows.values())


def in_order(results: Iterable[Result]) -> list[Result]:
    """By release, oldest first; servers before imports."""

    def key(result: Result) -> tuple[list[int], bool, str]:
        return (
            [int(part) for part in result.release.split(".")],
            result.what.startswith(IMPORTS),
            result.what,
        )

    return sorted(results, key=key)


def patch_names(results: Iterable[Result]) -> list[str]:
    """Return every patch that any row names, as the registry orders them."""
    return list(dict.fromkeys(name for result in results for name in result.patches))


def to_markdown(results: Iterable[Result]) -> str:
    """Return the document."""
    ordered = in_order(results)
    parts = [INTRODUCTION, _missing(ordered), PATCHES, _patches(ordered)]
    parts += [_reasons(ordered), ANSWERS, _answers(ordered), _words(ordered)]
    return "\n".join(part for part in parts if part)


def _missing(results: Sequence[Result]) -> str:
    there = {(result.release, result.what) for result in results}
    servers = [case.name for case in CASES if (case.release, case.model) not in there]
    imports = [
        f"{release} {IMPORTS}{device}"
        for release in RELEASES
        for device in DEVICES
        if (release, f"{IMPORTS}{device}") not in there
    ]
    missing = "; ".join([*servers, *imports])
    return f"Not run yet: {missing}.\n" if missing else ""


def _patches(results: Sequence[Result]) -> str:
    names = patch_names(results)
    head = ["vLLM", *(f"`{name}`" for name in names), "torch", "date", "commit"]
    rows = []
    for release in dict.fromkeys(result.release for result in results):
        here = [result for result in results if result.release == release]
        newest = max(here, key=lambda result: result.date)
        commits = ", ".join(dict.fromkeys(result.commit for result in here))
        cells = [_of_release(here, name) for name in names]
        rows.append([release, *cells, newest.versions.get("torch", ""), newest.date, commits])
    return _table(head, rows)


def _of_release(results: Sequence[Result], name: str) -> str:
    """Say the most that was seen of a patch: it ran, it was applied, or why there is nothing."""
    servers = [r for r in results if not r.what.startswith(IMPORTS) and name in r.patches]
    ran = [(r.what, r.patches[name]) for r in servers if r.patches[name].calls]
    if ran:
        return "; ".join(f"{seen.state}, {seen.calls} calls ({what})" for what, seen in ran)
    imported: dict[str, list[str]] = {}
    for result in results:
        seen = result.patches.get(name)
        if result.what.startswith(IMPORTS) and seen and seen.state.startswith("applied"):
            imported.setdefault(seen.state, []).append(result.what.removeprefix(IMPORTS))
    states = list(dict.fromkeys(r.patches[name].state for r in servers))
    if not states:
        states = [r.patches[name].state for r in results if r.what == ON_CPU and name in r.patches]
    text = ", ".join(states) or "not seen"
    more = [f"imported ({', '.join(devices)}): {state}" for state, devices in imported.items()]
    return "; ".join([text, *more])


def _reasons(results: Sequence[Result]) -> str:
    """Say once why a patch is not applied, with the releases that it is so in."""
    releases: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.what == ON_CPU or not result.what.startswith(IMPORTS):
            for name, seen in result.patches.items():
                if told(seen) and seen.reason:
                    key = (name, seen.state, seen.reason)
                    releases.setdefault(key, []).append(result.release)
    lines = [
        f"- `{name}` is {state} in {', '.join(dict.fromkeys(where))}: {reason}."
        for (name, state, reason), where in releases.items()
    ]
    return "\n".join([*lines, ""]) if lines else ""


def _answers(results: Sequence[Result]) -> str:
    head = ["vLLM", "model", "dtype", "compared with", "other tokens", "apart", "limit", "spoilt"]
    rows = []
    for result in results:
        if result.what.startswith(IMPORTS):
            continue
        oracle = "unpatched" if result.oracle == ITSELF else result.oracle
        tokens = f"{result.other_tokens} of {result.steps}" if result.steps else ""
        numbers = [_number(getattr(result, name)) for name in NUMBERS]
        rows.append(
            [result.release, result.what, result.dtype, oracle, tokens, *numbers, _short(result)]
        )
    return _table([*head, "verdict"], rows)


def _short(result: Result) -> str:
    return result.verdict if result.fine else f"**{result.verdict.replace('|', '/')}**"


def _words(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        imports = result.what.startswith(IMPORTS)
        said = [_why(result)] if result.why or (imports and not result.fine) else []
        said += [result.note] if result.note else []
        lines += [f"- {result.release} {result.what}: {sentence}" for sentence in said]
    return "\n".join(["", *lines, ""]) if lines else ""


def _why(result: Result) -> str:
    if result.verdict == "not served":
        return f"no server starts, patched or not; its first error is `{result.why}`"
    if result.what.startswith(IMPORTS) and result.fine:
        return result.why
    if result.why and result.fine:
        return f"the unpatched server does not start; its first error is `{result.why}`"
    return result.verdict


def _cell(result: Result, name: str) -> str:
    seen = result.patches.get(name)
    if seen is None:
        return ""
    # Why something was applied is why it is in the registry; why not is a sentence of its own.
    return f"{seen.state}:{seen.calls}:{without_paths(seen.reason) if told(seen) else ''}"


def told(seen: Seen) -> bool:
    """Whether the table says why."""
    return seen.state != "armed" and not seen.state.startswith("applied")


def without_paths(text: str) -> str:
    """Return a text that names no folder of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", " ".join(text.split()))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
