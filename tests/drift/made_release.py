"""Small made releases for scripts/record_release: a patch, trees, wheels, and what was written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ascend_patch._registry import Band, Patch, Target

ROPE = "class Rope:\n    def forward(self, q, key=None):\n        return q * {}\n"
LIMIT = "LIMIT = {}\n"
PATCH = Patch(
    id="turn",
    version="1",
    summary="turns",
    why="it does not",
    upstream="none",
    remove_when="never",
    bands=(
        Band(
            "vllm",
            ">=1.0,<1.2",
            ("1.0.0",),
            (Target("vllm.rope:Rope.forward", "host", "ours:forward", ("vllm.limits:LIMIT",)),),
        ),
    ),
    watch={"vllm": ("vllm.rope:watched",)},
)
Tree = Callable[..., Path]


def written(script: ModuleType, host: str = "vllm") -> dict[str, Any]:
    file = script.DATA / f"{host}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def refused(script: ModuleType, capsys, *arguments: str) -> str:
    assert script.main(["vllm", *arguments]) == 2
    said = capsys.readouterr()
    assert not (script.DATA / "vllm.json").exists()
    assert said.err.startswith("record_release: ")
    assert "Traceback" not in said.err
    return str(said.err)


def wheel(folder: Path, version: str, **files: str) -> None:
    name = f"vllm-{version}"
    contents = {
        "vllm/__init__.py": "raise RuntimeError('imported')\n",
        "vllm/rope.py": ROPE.format(1),
        "vllm/_C.abi3.so": "no source",
        **files,
    }
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        )
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
