"""patch_rotary's self-test: the kernels at the rotary layers of the loaded model."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from ascend_patch import _compare, _copies
from ascend_patch._log import get_logger
from ascend_patch._selftest import Case
from ascend_patch.impl import rotary_trials
from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import selftest, triton_call
from ascend_patch.kernels.selftest import Verdict, fault

logger = get_logger(__name__)

Expected = Callable[[], AbstractContextManager[None]]


# What has been tried in this process: weights that are loaded again are no other layers.
_tried: set[rotary_trials.Shape] = set()


def cases(model: Any, as_expected: Expected) -> list[Case]:
    """The tests of a loaded model: each call by each implementation that takes it.

    Args:
        model: A torch module; a layer is what has `cos_sin_cache`, `head_size`, `is_neox_style`.
        as_expected: While it is entered, layers run what ours is held to: the host's own code.
    """
    found = {shape: place for shape, place in rotary_trials.layers(model) if shape not in _tried}
    trials: list[tuple[str, selftest.RopeTrial]] = []
    whole: list[Case] = []
    for shape, (layer, owner) in found.items():
        seed = secrets.randbelow(2**31)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, trial in rotary_trials.trials(shape, layer, owner, generator):
            trials.append((f"{name} (seed {seed})", trial))
        once = rotary_trials.call(shape, 7, generator, layer.cos_sin_cache)
        judged = _without_gradients(partial(_as_a_whole, layer, once, as_expected))
        whole.append(Case(f"the layer of {shape} (seed {seed})", judged))
    for shape, owner in rotary_trials.given_angles(model):
        if shape not in _tried:
            seed = secrets.randbelow(2**31)
            generator = torch.Generator("cpu").manual_seed(seed)
            for name, trial in rotary_trials.angles_trials(shape, owner, generator):
                trials.append((f"{name} (seed {seed})", trial))
            _tried.add(shape)
    # Last: what is made available here stays only where a test of it will run.
    devices = {trial.device for _, trial in trials}
    offered = [(device, *pair) for device in devices for pair in selftest.offer(device)]
    made = [_case(name, trial, i.name) for name, trial in trials for i in trial.candidates()]
    tried = {(t.device, t.operator, i.name) for _, t in trials for i in t.candidates()}
    for device, operator, name in offered:
        if (device, operator, name) not in tried:
            dispatch.unregister(operator, device, name)
    _tried.update(found)
    return made + whole


def _case(name: str, trial: selftest.RopeTrial, implementation: str) -> Case:
    def judged() -> Verdict | None:
        if implementation not in (i.name for i in trial.candidates()):
            return None  # withdrawn meanwhile
        with dispatch.only(implementation):
            return trial.judged()

    return Case(
        f"{name} by {implementation}",
        _without_gradients(judged),
        partial(_withdraw, trial, implementation),
        partial(_warm, trial, implementation),
    )


def _warm(trial: selftest.RopeTrial, implementation: str) -> None:
    if implementation == triton_call.NAME:
        with dispatch.only(implementation):
            trial.warm()


def _withdraw(trial: selftest.RopeTrial, name: str) -> str:
    """Take an implementation out of use; empty where nothing else takes the call."""
    dispatch.unregister(trial.operator, trial.device, name)
    left = [i.name for i in trial.candidates()]
    return "" if name in left or not left else f"{trial.operator} by {name} on {trial.device}"


def _without_gradients(function: Callable[[], Verdict | None]) -> Callable[[], Verdict | None]:
    def judged() -> Verdict | None:
        with torch.no_grad():
            return function()

    return judged


def _as_a_whole(layer: Any, call: selftest.Call, as_expected: Expected) -> Verdict:
    """The layer with ours in it against what is expected of it; finds ours that misreads it."""

    def run() -> Any:
        copies = _copies.Copies()
        return layer(*(copies.of(x) for x in (call.positions, call.query, call.key)))

    try:
        with as_expected():
            theirs = run()
    except Exception as error:
        # Some need the context of a forward pass; the kernels have been compared all the same.
        logger.info("%s cannot be called alone: %s", type(layer).__name__, error)
        return Verdict()
    finding = _compare.find(_copies.Copies(), theirs, run())
    if not finding.wrong:
        return Verdict()
    return fault(f"unlike the host's own, {finding.wrong}")
