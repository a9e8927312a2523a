"""All patches at once on a real vllm-ascend, through sitecustomize, in the orders of real starts.

What is applied when, and how often; and that nothing of it is left once it is taken back.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from ascend_case import START, WITH_TRITON, Host

RELEASES = ("0.13.0", "0.18.0")
# Which processes a server has, and in which order each comes by its modules. A process of its own
# for each; `fork` parts it, and the child goes on with what its parent has imported.
ORDERS = {
    "front end, and a worker forked off it": (
        *("platform", "plugins", "fork"),
        *("worker", "backend", "models", "connector"),
    ),
    "engine core that is its worker too": (
        *("plugins", "worker", "backend", "models", "scheduler"),
    ),
    "models and scheduler before any patch of vllm-ascend": (
        *("plugins", "scheduler", "models", "platform", "worker", "backend"),
    ),
}
FORKED, ENGINE, _ = ORDERS

ROTARY = "vllm_ascend.ops.rotary_embedding"
GDN = "vllm_ascend.patch.worker.patch_"
SCHEDULER = "vllm.v1.core.sched.scheduler:"
# Modules that only a worker or an engine core imports: where a front end's targets wait.
NOT_IN_A_FRONT_END = (
    "vllm_ascend.attention.attention_v1:",
    "vllm_ascend.worker.",
    "vllm_ascend.distributed.",
    "vllm.v1.attention.backends.gdn_attn:",
    GDN,
    SCHEDULER,
)


@functools.cache
def found(
    release: str, order: str, before: str = ""
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each process of a start was like, and what was left after its undo; a child first.

    Args:
        before: Code that runs before the first phase.
    """
    phases = list(ORDERS[order])
    code = f"""
sys.modules["soundfile"] = None
{WITH_TRITON}
import no_vision, json, ascend_start
{before}
found = ascend_start.start({phases!r})
print()
print(json.dumps(found))
"""
    printed = Host(release).run(START + code, patches="all", seconds=500)
    parts = json.loads(printed.strip().splitlines()[-1])
    processes = list(zip(parts[::2], parts[1::2], strict=True))
    print(release, order, *(part["events"] for part, _ in processes), sep="\n")
    return processes


pytestmark = pytest.mark.slow
each_start = pytest.mark.parametrize(
    ("release", "order"), [(release, order) for release in RELEASES for order in ORDERS]
)


def applied(process: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n: t for n, t in process["targets"].items() if t["state"] == "applied"}


@each_start
def test_the_shim_came_by_sitecustomize_and_each_patch_has_begun(release, order):
    for process, _ in found(release, order):
        assert (process["host"], process["door"]) == ("vllm_ascend", "sitecustomize")
        assert process["problems"] == []
        assert set(process["patches"]) == set(process["all"])
        for patch, (state, reason, notes) in process["patches"].items():
            assert state in ("applied", "armed"), (patch, reason)
            assert notes == [], "a module had been imported before its patch was armed"


@each_start
def test_each_target_is_ours_once_around_what_the_release_had(release, order):
    for process, _ in found(release, order):
        assert applied(process)
        for name, target in applied(process).items():
            if target["kind"] == "operator":
                assert target["changed"], name
                continue
            assert target["layers"] == 1, (name, target)
            assert target["around the original"], name
            assert target["same owner"], name
            # Whoever had imported it by name has ours too.
            assert target["others with the original"] == [], name
            assert target["reason"] == "", (name, target["reason"])


@each_start
def test_what_waits_is_what_the_process_has_not_imported(release, order):
    first, *others = (process for process, _ in found(release, order))
    waiting = sorted(first["targets"].keys() - applied(first).keys())
    assert waiting == ([n for n in waiting if n.startswith(SCHEDULER)] if order == FORKED else [])
    assert len(others) == (order == FORKED)
    for front_end in others:
        waiting = front_end["targets"].keys() - applied(front_end).keys()
        expected = {n for n in front_end["targets"] if n.startswith(NOT_IN_A_FRONT_END)}
        assert waiting == expected


@each_start
def test_targets_come_when_the_module_that_assigns_them_has_run(release, order):
    for process, _ in found(release, order):
        came = [name for _, _, names in process["events"] for name in names]
        assert sorted(came) == sorted(applied(process)), "each once, and nothing by another way"
        modules = [module for _, module, _ in process["events"]]
        assert len(set(modules)) == len(modules)
        phase_of = {name: phase for phase, _, names in process["events"] for name in names}
        module_of = {name: module for _, module, names in process["events"] for name in names}
        for name in came:
            symbol = name.partition(":")[0]
            if "::" not in name:
                assert module_of[name] == symbol
        # vllm-ascend 0.18.0 registers its operator in another module than it writes it in.
        operator = "vllm::npu_rotary_embedding"
        if operator in came:
            assert module_of[operator] == "vllm_ascend.ops.register_custom_ops"
            assert modules.index(module_of[operator]) > modules.index(ROTARY)
        if "worker" in ORDERS[order]:
            # In vLLM's own classes it puts its methods late, from its worker's patches.
            for name in came:
                if name.startswith(GDN):
                    assert phase_of[name] == "worker"


@each_start
def test_aliases_are_rebound(release, order):
    process, _ = found(release, order)[0]
    name = f"{GDN}qwen3_5:to_int64_tuple"
    if release == "0.18.0":
        assert process["targets"][name]["aliases"] == [name, f"{GDN}qwen3_next:to_int64_tuple"]
    else:
        assert name not in process["targets"]


@each_start
def test_undo_leaves_every_attribute_the_object_that_it_was(release, order):
    for process, after in found(release, order):
        assert after["wrong"] == []
        assert after["still ours"] == []
        aliases = {a for t in applied(process).values() for a in t.get("aliases", [])}
        assert set(after["changed beside places"]) <= aliases
        methods = [t for t in applied(process).values() if t["kind"] != "operator"]
        assert after["changed"] >= len(methods)
        assert set(after["states"].values()) == {"reverted"}


def test_an_alias_that_undo_forgets_is_seen():
    forgets = "import ascend_patch._seams; ascend_patch._seams._rebind = lambda *_: None"
    ((_, after),) = found("0.18.0", ENGINE, forgets)
    assert after["still ours"] == [f"{GDN}qwen3_next:to_int64_tuple"]
