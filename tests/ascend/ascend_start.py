"""A start-up of vllm-ascend in this process, phase by phase, and what ours did in each.

Import it first: it watches the shim attach its targets, and what each place held before. It
changes nothing: sitecustomize has armed the finder already, and vLLM is imported by the phases.
"""

from __future__ import annotations

import inspect
import multiprocessing
import sys
from types import ModuleType
from typing import Any

import torch
from wrapt import FunctionWrapper

from ascend_patch import _apply
from ascend_patch._registry import Target, load

HOSTS = ("vllm", "vllm_ascend")
# The transfer engine is no part of the hosts, and nothing is transferred here.
for name in ("mooncake", "mooncake.engine"):
    sys.modules[name] = ModuleType(name)
sys.modules["mooncake.engine"].TransferEngine = type("TransferEngine", (), {})
# What ours found in each place when it came, before it changed anything.
before: dict[str, Any] = {}
# (phase, module that had run, targets that were applied then), in order.
events: list[tuple[str, str, list[str]]] = []
_phase = ""
_has_run = _apply.Applier.module_has_run


def module_has_run(self: _apply.Applier, module: ModuleType) -> None:
    waiting = {
        target.id: target
        for name, decision in self._decisions.items()
        for target in (decision.band.targets if decision.band else ())
        if target.module == module.__name__
        and self._state.patches[name].target(target.id).state == "armed"
    }
    before.update({name: _now(target) for name, target in waiting.items()})
    _has_run(self, module)
    states = {t.id: t.state for p in self._state.patches.values() for t in p.targets}
    applied = [name for name in waiting if states[name] == "applied"]
    events.append((_phase, module.__name__, applied))


_apply.Applier.module_has_run = module_has_run


def _now(target: Target) -> Any:
    """What a target leads to: the attribute itself, or the kernels that an operator has."""
    if target.operator:
        return _kernels(target.operator)
    owner = _owner(target)
    return owner, vars(owner).get(target.place.qualname.rpartition(".")[2])


def _owner(target: Target) -> Any:
    owner: Any = sys.modules[target.place.module]
    for part in target.place.qualname.split(".")[:-1]:
        owner = inspect.getattr_static(owner, part)
    return owner


def _kernels(operator: str) -> str:
    """Each kernel and where it was registered, as the dispatcher prints them."""
    return torch._C._dispatch_dump(operator)


# --- the phases of a start ---------------------------------------------------------------------


def platform() -> None:
    """The plugin is found, and its platform's hook patches vLLM (front end; 0.18: workers too)."""
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert type(current_platform).__name__ == "NPUPlatform", current_platform
    parser = FlexibleArgumentParser()
    parser.add_argument("--quantization", choices=["awq"])
    current_platform.pre_register_and_update(parser)


def plugins() -> None:
    """Every process: connectors and loaders are registered by name."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def scheduler() -> None:
    """The engine core: the scheduler, and its side of the connector by the factory."""
    import vllm.v1.core.sched.scheduler
    import vllm.v1.engine.core  # noqa: F401

    connector()


def connector() -> None:
    """The class that the factory makes of the name that both releases serve."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = KVTransferConfig(kv_connector="MooncakeConnectorV1", kv_role="kv_both")
    found = KVConnectorFactory.get_connector_class(config)
    assert found.__module__.startswith("vllm_ascend."), found


def worker() -> None:
    """The worker's module, then what its constructor does up to the device."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm_ascend import ops, utils
    from vllm_ascend.worker import worker as module

    assert module.NPUWorker
    utils.adapt_patch()
    ops.register_dummy_fusion_op()
    config = VllmConfig()
    with set_current_vllm_config(config):
        utils.register_ascend_customop(config)


def backend() -> None:
    """The attention backend, by the name that the platform gives."""
    import vllm_ascend.attention.attention_v1
    import vllm_ascend.ops.register_custom_ops  # noqa: F401


def models() -> None:
    """Model classes, as the registry imports them."""
    from vllm.model_executor.models import ModelRegistry

    for name in ("Qwen3ForCausalLM", "Qwen3NextForCausalLM"):
        assert ModelRegistry._try_load_model_cls(name) is not None, name


def start(phases: list[str]) -> list[Any]:
    """Run phases by name, each event noted with the phase that it came in; then undo.

    After `fork` the rest happens in a child, as where workers are forked off.

    Returns:
        What `report` and `undo` say, of this process and before that of the child.
    """
    global _phase
    for at, phase in enumerate(phases):
        if phase == "fork":
            return [*_in_a_child(phases[at + 1 :]), report(), undo()]
        _phase = phase
        globals()[phase]()
    return [report(), undo()]


def _in_a_child(phases: list[str]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(start(phases)))
    child.start()
    there.close()
    found: list[Any] = here.recv()
    child.join()
    return found


# --- what came of it ---------------------------------------------------------------------------


def targets() -> dict[str, tuple[str, Target]]:
    """The targets of this release by their ids: the patch and the declaration."""
    from ascend_patch._runtime import current

    return {
        target.id: (name, target)
        for name, decision in current().decisions.items()
        if decision.band is not None
        for target in decision.band.targets
    }


def report() -> dict[str, Any]:
    """What every target is now, by its id; and states and problems as `status` has them."""
    import ascend_patch

    status = ascend_patch.status()
    states = {t["id"]: t for patch in status["patches"] for t in patch["targets"]}
    return {
        "patches": {p["id"]: [p["state"], p["reason"], p["notes"]] for p in status["patches"]},
        "problems": status["problems"],
        "host": status["host"],
        "door": status["door"],
        "events": events,
        "targets": {
            name: {
                "patch": patch,
                "state": states[name]["state"],
                "reason": states[name]["reason"],
                **(_look(target) if name in before else {}),
            }
            for name, (patch, target) in targets().items()
        },
        "all": sorted(load()),
    }


def _look(target: Target) -> dict[str, Any]:
    """What a place holds: how many layers of ours, around what, and who else has the original."""
    if target.operator:
        return {"kind": "operator", "changed": _kernels(target.operator) != before[target.id]}
    owner, original = before[target.id]
    same_owner = owner is _owner(target)
    held = vars(owner).get(target.place.qualname.rpartition(".")[2])
    ours, inner = 0, held
    while inner is not original and inner is not None:
        ours += _is_ours(inner)
        inner = (
            inner.__dict__.get("__wrapped__", None)
            if not isinstance(inner, FunctionWrapper)
            else inner.__wrapped__
        )
    return {
        "kind": type(held).__name__,
        "same owner": same_owner,
        "layers": ours,
        "around the original": inner is original,
        "inherited": original is None,
        "others with the original": _holders(original) if isinstance(owner, ModuleType) else [],
        "aliases": _holders(held) if isinstance(owner, ModuleType) else [],
    }


def _is_ours(function: Any) -> bool:
    if isinstance(function, FunctionWrapper):
        return function._self_wrapper.__module__ == "ascend_patch._replacement"
    return function.__code__.co_filename.endswith("ascend_patch/_replacement.py")


def _holders(value: Any) -> list[str]:
    """The modules of the hosts that bind a value, and under which names."""
    return sorted(
        f"{module}:{name}"
        for module, namespace in _modules().items()
        for name, held in namespace.items()
        if held is value
    )


def _modules() -> dict[str, dict[str, Any]]:
    return {
        name: dict(object.__getattribute__(module, "__dict__"))
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in HOSTS and issubclass(type(module), ModuleType)
    }


def everything() -> dict[str, Any]:
    """Every attribute of the hosts' modules and of their classes, by a name."""
    found: dict[str, Any] = {}
    for module, namespace in _modules().items():
        for name, value in namespace.items():
            found[f"{module}:{name}"] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] in HOSTS:
                key = f"{value.__module__}:{value.__qualname__}"
                found.update({f"{key}.{n}": v for n, v in dict(vars(value)).items()})
    return found


def undo() -> dict[str, Any]:
    """Take every patch back: what is other than it was before ours came, attribute by attribute."""
    import ascend_patch

    applied = everything()
    ours = {
        id(applied[f"{t.place}"])
        for name, (_, t) in targets().items()
        if name in before and not t.operator and f"{t.place}" in applied
    }
    for name in ascend_patch.status()["patches"]:
        ascend_patch.revert(name["id"])
    after = everything()
    changed = {n for n in applied.keys() | after.keys() if applied.get(n) is not after.get(n)}
    places = {str(t.place) for name, (_, t) in targets().items() if name in before}
    wrong = []
    for name, (_, target) in targets().items():
        if name not in before:
            continue
        if target.operator:
            if _kernels(target.operator) != before[name]:
                wrong.append(f"{name} has other kernels")
        elif _now(target)[1] is not before[name][1]:
            wrong.append(f"{name} is not what it was")
    return {
        "wrong": wrong,
        "still ours": sorted(n for n, value in after.items() if id(value) in ours),
        "changed beside places": sorted(changed - places),
        "changed": len(changed),
        "states": {p["id"]: p["state"] for p in ascend_patch.status()["patches"]},
    }
