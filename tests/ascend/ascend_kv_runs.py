"""MooncakeConnectorV1 on a release: what happens in one process unpatched and in one patched."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import _disaggregated
from ascend_attention_runs import session_seed
from ascend_case import BRANCHES, GENERATED, START, Host

RELEASES = ("0.13.0", "0.18.0", "releases/v0.13.0", "releases/v0.18.0")
PATCH = "kv_connector"
# transformers reads audio through a system library that these environments need not have.
OPENING = """
sys.modules["soundfile"] = None
NO_VISION
import json, os, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import ascend_kv, ascend_kv_cases

def state():
    import ascend_patch
    patches = {p["id"]: p for p in ascend_patch.status()["patches"]}
    return patches.get("kv_connector", {"state": "off"})["state"]
"""
# 0.11's runner asks for more of it than its operators do.
BUILT = GENERATED + 'info.__soc_version__ = "ascend910b1"\n'
# Of a process with all cases, on a machine that has other things to do.
SECONDS = 500
# Threads of the release that wait for ever keep a process from ending.
ENDING = """
found = json.dumps(found)
print(flush=True)
print(found, flush=True)
os._exit(0)
"""


def opening(host: Host) -> str:
    """What each process begins with."""
    # The others' environments have a Transformers that asks for the library's version.
    names = "import no_vision" if host.release in ("0.13.0", "0.18.0") else ""
    return OPENING.replace("NO_VISION", names)


def once(run: Any) -> Any:
    """A process that fails is not started again for each test that asks for its report."""

    @functools.cache
    def tried(*given: str) -> Any:
        try:
            return run(*given)
        except Exception as error:
            return error

    def found(*given: str) -> Any:
        report = tried(*given)
        if isinstance(report, Exception):
            raise report
        return report

    return found


@once
def results(label: str, patches: str) -> dict[str, Any]:
    """Each case's report."""
    host = Host(label)
    names = f"SEED = {session_seed()}\n" + START + (BUILT if label in BRANCHES else "")
    code = f"found = [ascend_kv_cases.everything(SEED, {patches == PATCH}), state()]"
    if patches == PATCH:
        code += "\nfound[0]['reverted'] = ascend_kv_cases.reverted(SEED)"
    code += ENDING
    printed = host.run(names + opening(host) + code, patches=patches, seconds=SECONDS)
    return _found(printed, patches)


def _found(printed: str, patches: str) -> dict[str, Any]:
    found, state = json.loads(printed.strip().splitlines()[-1])
    assert state == ("applied" if patches == PATCH else "off"), state
    return found


@once
def over_tcp(label: str, patches: str) -> dict[str, Any]:
    """Each case's report, with a process for each rank, and Mooncake's own engine between them."""
    host = Host(label)
    engine = str(_disaggregated.engine_folder(host.python))
    names = f"SEED = {session_seed()}\n" + START + (BUILT if label in BRANCHES else "")
    code = "import ascend_kv_processes\n"
    code += f"found = [ascend_kv_processes.everything(SEED, {patches == PATCH}), state()]"
    path = f"import sys\nsys.path.append({engine!r})\n"
    given = {"ASCEND_KV_ENGINE": "tcp"}
    printed = host.run(
        path + names + opening(host) + code + ENDING, patches=patches, seconds=SECONDS, **given
    )
    return _found(printed, patches)


def both(label: str, name: str) -> tuple[Any, Any]:
    """A case's report unpatched and patched."""
    print(f"repeat with ASCEND_PATCH_SEED={session_seed()}")
    pair = results(label, "none")[name], results(label, PATCH)[name]
    print(label, name, *pair, sep="\n")
    return pair


def said(found: dict[str, Any]) -> list[tuple[bool, list[int]]]:
    """(finished, invalid blocks) of each decode rank; nothing is reported before the end."""
    assert not any(one["early"] for one in found["heard"])
    return [(one["done"], one["invalid"]) for one in found["heard"]]


def check_moves(label: str, said: Callable[[dict[str, Any]], list[Any]] = said) -> None:
    """What the release moves is moved, unpatched and patched, and freed once."""
    for patches in ("none", PATCH):
        for ratio, found in results(label, patches)["ratios"].items():
            assert all(found["right"]), (patches, ratio)
            assert set(map(str, said(found))) == {"(True, [])"}, (patches, ratio)
            assert set(found["freed"]) == {1}, (patches, ratio)


def check_waited(
    stock: Any, ours: Any, blocks: list[int], said: Callable[[dict[str, Any]], list[Any]] = said
) -> None:
    """What waited for longer than prefill keeps its blocks is read unpatched, and refused by us."""
    for name in ("soon", "late", "later"):
        assert said(stock[name]) == [(True, [])]
        assert said(ours[name]) == [(True, [] if name == "soon" else blocks)]
        assert ours[name]["freed"] == [1]
