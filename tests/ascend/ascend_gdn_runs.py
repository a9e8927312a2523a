"""GDN on a release: all cases in one process unpatched and in one patched; kept for all tests."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ascend_attention_runs import session_seed
from ascend_case import BRANCHES, GENERATED, START, WITH_TRITON, Host

TESTS = Path(__file__).resolve().parents[1]
RELEASES = ("0.13.0", "0.18.0", "releases/v0.13.0", "releases/v0.18.0")
PATCH = "gdn_attn"
# transformers reads audio through a system library that these environments need not have.
OPENING = f"""
sys.path[1:1] = [{str(TESTS / "unit")!r}, {str(TESTS / "kernels")!r}]
sys.modules["soundfile"] = None
if RELEASE[:4] in ("0.13", "0.18"):
    import no_vision  # their patches import the models of images
import json, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import vllm_ascend.ops

def patch():
    import ascend_patch
    patches = {{p["id"]: p for p in ascend_patch.status()["patches"]}}
    return patches.get({PATCH!r}, {{"state": "off", "reason": "", "targets": []}})
"""
ALL = """
import ascend_gdn_cases
found = ascend_gdn_cases.everything(RELEASE, SEED)
print(json.dumps([found, patch()]))
"""


def run(label: str, code: str, *, patches: str = PATCH, **variables: str) -> Any:
    """What code prints last, as JSON, in a process of that release; `SEED` is the session's."""
    host = Host(label)
    opening = START + (GENERATED if label in BRANCHES else "")
    # 0.11.0's environment has another Triton, and its rule needs none.
    opening += ("" if host.release == "0.11.0" else WITH_TRITON) + OPENING
    names = f"SEED, RELEASE = {session_seed()}, {host.release!r}\n"
    # All cases of a release take a minute on an idle machine.
    printed = host.run(names + opening + code, patches=patches, seconds=900, **variables)
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
    pair = tuple(results(label, patches)[0][name] for patches in ("none", PATCH))
    print(label, name, *pair, sep="\n")
    return pair
