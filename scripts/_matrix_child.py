"""Imports what the patches change, in a process with the shim, and prints what became of them.

Started by scripts/matrix in a release's own environment; ASCEND_PATCHES_DEVICE names the device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any


def main() -> None:
    out, *modules = sys.argv[1:]
    # Without the shim, where modules are named: what vLLM itself can import here.
    found = {"not imported": imported(modules)} if modules else patched()
    # vLLM logs to stdout.
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)


def imported(modules: list[str]) -> dict[str, str]:
    """Import modules and return why some cannot be."""
    failed = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def patched() -> dict[str, Any]:
    """Import what armed patches wait for and return what became of them."""
    import torch
    import vllm  # noqa: F401  (the shim decides when it is imported)

    from ascend_patch import _registry, _runtime

    runtime = _runtime.current()
    modules = {
        target.module
        for name, decision in runtime.decisions.items()
        if runtime.state.patches[name].state == "armed" and decision.band is not None
        for target in decision.band.targets
    }
    failed = imported(sorted(modules))
    return {
        "patches": {
            name: {
                "state": patch.state,
                "reason": patch.reason,
                "targets": [target.state for target in patch.targets],
            }
            for name, patch in runtime.state.patches.items()
        },
        "problems": list(runtime.state.problems),
        "not imported": failed,
        "known": sorted(_registry.load()),
        "versions": {
            "vllm": runtime.state.facts["versions"]["vllm"],
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    main()
