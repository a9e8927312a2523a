"""The entry point in `vllm.general_plugins`: the last door, for processes that no other opened.

vLLM calls it in the front end, the engine core and every worker. Where the door was open all
along it looks again for modules that a stranger's finder has brought in past ours.
"""

from __future__ import annotations

import sys
from typing import Any

from ascend_patch import _bootstrap


def load() -> None:
    """Arm late if nothing else has; never raise but for a refusal that the user asked for."""
    _bootstrap.open_door("plugin")
    runtime = sys.modules.get("ascend_patch._runtime")
    if runtime is not None:
        from ascend_patch._guard import contain

        contain("vLLM loaded its plugins", _look_again, runtime)


def _look_again(runtime: Any) -> None:
    runtime.current().look_again()
