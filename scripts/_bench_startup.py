"""What the shim costs a process that never imports vLLM: scripts/bench startup.

Every variant is started once a round, in an order that turns from round to round, and compared
with the bare interpreter of the same round: a machine that slows down slows all of them. Figures
of two runs, or of two machines, are not comparable; deltas and ratios within one run are.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
BARE = "bare python"
# Leaves out what the two sides of a measurement would not share.
IGNORED = ("ASCEND_PATCHES", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONSTARTUP")
MISS = """
import sys, time
from ascend_patch import _bootstrap
finder = _bootstrap.finder()
names = [f"some.module{i}" for i in range(1000)]
best = float("inf")
for _ in range(50):
    start = time.perf_counter_ns()
    for name in names:
        finder.find_spec(name, None, None)
    best = min(best, (time.perf_counter_ns() - start) / len(names))
print(best)
"""


def main() -> None:
    arguments = _arguments()
    variants = {
        BARE: ("pass", {}),
        "off": ("pass", {"PYTHONPATH": arguments.shim}),
        "armed": ("pass", {"PYTHONPATH": arguments.shim, "ASCEND_PATCHES": "all"}),
        "import wrapt": ("import wrapt", {}),
    }
    if _start(arguments.python, *variants["import wrapt"], check=False) is None:
        del variants["import wrapt"]
        print(f"wrapt is not installed for {arguments.python}: that row is left out")
    samples = measure(arguments.python, variants, arguments.rounds)
    rows = table(samples)
    miss = finder_miss(arguments.python, arguments.shim)
    print(f"{arguments.rounds} rounds, {facts(arguments.python)}\n")
    print(f"{'':14} {'median ms':>10} {'added ms':>10} {'ratio':>8}")
    for row in rows:
        print(f"{row['what']:14} {row['ms']:10.2f} {row['added_ms']:+10.2f} {row['ratio']:8.3f}")
    print(f"{'finder miss':14} {miss:7.0f} ns a look-up")
    if arguments.csv:
        write_csv(arguments.csv, rows, miss, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench startup", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter to measure")
    parser.add_argument("--shim", default=str(ROOT), help="folder to put on PYTHONPATH")
    parser.add_argument("--rounds", type=int, default=30, help="starts of each variant")
    parser.add_argument("--csv", type=Path, help="file to write")
    return parser.parse_args()


def measure(
    python: str, variants: dict[str, tuple[str, dict[str, str]]], rounds: int
) -> dict[str, list[float]]:
    """Wall-clock milliseconds of each start, by variant, round by round."""
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _start(python, *variants[name])  # writes the .pyc files, warms the page cache
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_start(python, *variants[name]) or 0.0)
    return samples


def table(samples: dict[str, list[float]]) -> list[dict[str, float | str]]:
    """Median time, and medians of the differences and quotients within each round."""
    bare = samples[BARE]
    return [
        {
            "what": name,
            "ms": median(times),
            "added_ms": median(t - b for t, b in zip(times, bare, strict=True)),
            "ratio": median(t / b for t, b in zip(times, bare, strict=True)),
        }
        for name, times in samples.items()
    ]


def finder_miss(python: str, shim: str) -> float:
    """Nanoseconds that the armed finder takes for a name that nobody watches."""
    environment = {**_environment(), "PYTHONPATH": shim, "ASCEND_PATCHES": "all"}
    done = subprocess.run(
        [python, "-c", MISS], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def facts(python: str) -> str:
    """The interpreter, processor and commit that the figures belong to."""
    return ", ".join((_version(python), _processor(), _commit()))


def write_csv(
    path: Path, rows: list[dict[str, float | str]], miss: float, arguments: argparse.Namespace
) -> None:
    """One line a variant, each with what it was measured on."""
    common = {
        "rounds": arguments.rounds,
        "python": _version(arguments.python),
        "cpu": _processor(),
        "commit": _commit(),
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "ms", "added_ms", "ratio", *common])
        writer.writeheader()
        for row in rows:
            digits = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**digits, **common})
        writer.writerow({"what": "finder miss", "ms": f"{miss / 1e6:.7f}", **common})


def _start(python: str, code: str, variables: dict[str, str], check: bool = True) -> float | None:
    environment = {**_environment(), **variables}
    begin = time.perf_counter()
    done = subprocess.run(
        [python, "-c", code],
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stderr=None if check else subprocess.DEVNULL,
    )
    elapsed = (time.perf_counter() - begin) * 1e3
    if check:
        done.check_returncode()
    return None if done.returncode else elapsed


def _environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name not in IGNORED}


def _version(python: str) -> str:
    code = "import platform; print(platform.python_implementation(), platform.python_version())"
    return subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
