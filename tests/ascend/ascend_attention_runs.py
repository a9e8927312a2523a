"""All cases on one release, in one process unpatched and in one patched; kept for all tests."""

from __future__ import annotations

import functools
import json
import os
import secrets
from typing import Any

from ascend_case import BRANCHES, GENERATED, START, Host

FINAL = ("0.11.0", "0.13.0", "0.18.0", "0.23.0")
RELEASES = (*FINAL, "releases/v0.13.0", "releases/v0.18.0", "releases/v0.23.0")

# transformers reads audio through a system library that these environments need not have; the
# device module of 0.23.0 and its operators import each other, the operators first.
OPENING = """
sys.modules["soundfile"] = None
import json, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import vllm_ascend.ops
import ascend_attention
from ascend_attention import Batch, Model, module, operators
from ascend_attention_cases import CASES

def router():
    import ascend_patch
    patches = {p["id"]: p for p in ascend_patch.status()["patches"]}
    return patches.get("attention_router", {"state": "off", "reason": "", "targets": []})

def left():
    import ascend_patch
    found = ascend_patch.status().get("left_to_host", {})
    router = "attention_router: "
    return sorted(name.removeprefix(router) for name in found if name.startswith(router))
"""

ALL = """
found = {name: ascend_attention.report(case, SEED) for name, case in CASES.items()}
print(json.dumps([found, router()]))
"""


@functools.lru_cache(maxsize=1)
def session_seed() -> int:
    """One seed for a session, so that a release's cases run once."""
    chosen = os.environ.get("ASCEND_PATCH_SEED")
    return int(chosen) if chosen else secrets.randbelow(2**31)


def run(
    label: str,
    code: str,
    *,
    patches: str = "attention_router",
    seed: int | None = None,
    **variables: str,
) -> Any:
    """What code prints last, as JSON, in a process of that release with further variables."""
    host = Host(label)
    chosen = session_seed() if seed is None else seed
    opening = START + (GENERATED if label in BRANCHES else "")
    printed = host.run(
        f"SEED = {chosen}\n{opening}\n{OPENING}\n{code}", patches=patches, **variables
    )
    return json.loads(printed.strip().splitlines()[-1])


@functools.cache
def results(label: str, patches: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each case's report, and the state of the patch in that process."""
    found, state = run(label, ALL, patches=patches)
    assert state["state"] == ("off" if patches == "none" else "applied"), state
    return found, state


def both(label: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case's report unpatched and patched."""
    print(f"repeat with ASCEND_PATCH_SEED={session_seed()}")
    pair = tuple(results(label, patches)[0][name] for patches in ("none", "attention_router"))
    print(label, name, *pair, sep="\n")
    return pair
