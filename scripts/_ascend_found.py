"""What the offline Ascend compiler shows, asked of the tests; and where it is written."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "kernels"
FOLDER = ROOT / "docs" / "ascend"
ARCHITECTURES = ("Ascend910B1", "Ascend910B3", "Ascend910B4", "Ascend910_9391")
UNIFIED_BUFFER = 192 * 1024


def found(
    script: str, *arguments: str, architecture: str = "Ascend910B3"
) -> dict[str, dict[str, object]]:
    """What a script of tests/kernels prints: {"versions": ..., "rows": {name: row}}."""
    python = os.environ.get("ASCEND_TRITON_PYTHON", sys.executable)
    path = os.pathsep.join((str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_ASCEND_ARCH": architecture}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    print(script, *arguments, architecture, file=sys.stderr, flush=True)
    command = [python, str(TESTS / script), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def committed(name: str) -> list[dict[str, str]]:
    """The rows of a table that was written before; none if there is none."""
    try:
        with (FOLDER / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def write(name: str, table: list[dict[str, object]], text: str) -> None:
    """docs/ascend/NAME.csv and NAME.md."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    (FOLDER / f"{name}.md").write_text(text)
    print(f"{len(table)} rows in docs/ascend/{name}.csv")
