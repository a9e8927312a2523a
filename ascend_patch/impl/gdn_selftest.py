"""patch_gdn_attn's self-test: the kernels of prefill at the GDN layers of the loaded model.

A kernel that is wrong is withdrawn. Where it was the last one on an accelerator the layer's steps
are the release's own: see `gdn_ascend_served` and `gdn_vllm_trial`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ascend_patch._selftest import Case
from ascend_patch.impl.gdn_trials import ConvTrial, GatingTrial
from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import cases as gdn_cases
from ascend_patch.kernels.gdn import conv, conv_triton, gating, gating_triton, selftest
from ascend_patch.kernels.selftest import Verdict

Expected = Callable[[], AbstractContextManager[None]]
Trial = selftest.ChunkTrial | ConvTrial | GatingTrial

REFERENCE = "reference"
# Chunks of 64: less than one, one and a token more, one token, none, more than two. And whole ones:
# Triton compiles a kernel again for numbers that are multiples of 16.
BATCHES = ((3, 65, 1, 0, 130), (128,))
# What has been tried in this process: weights that are loaded again are no other layers.
_tried: set[Layer] = set()


@dataclass(frozen=True)
class Layer:
    """What a kernel sees of a layer, on this rank; layers that look alike are tried once."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        """As messages have it."""
        return (
            f"{str(self.dtype).removeprefix('torch.')}, heads {self.key_heads}:{self.value_heads} "
            f"of {self.key_size}:{self.value_size}"
        )

    def trials(self, seed: int) -> Iterator[tuple[str, Trial]]:
        """(name, call) of what a prefill step asks of the kernels."""
        channels = 2 * self.key_heads * self.key_size + self.value_heads * self.value_size
        for lengths in BATCHES:
            name = f"{self}, T {sum(lengths)}"
            for layout in gdn_cases.LAYOUTS:
                inputs = gdn_cases.make_inputs(self._case(lengths, layout), seed, str(self.device))
                yield f"{selftest.CHUNK}, {name}, states {layout}", selftest.ChunkTrial(inputs)
            trial = ConvTrial(lengths, channels, self.kernel, self.dtype, self.device, seed)
            yield f"{trial.operator}, {name}", trial
        gates = GatingTrial(sum(BATCHES[0]), self.value_heads, self.dtype, self.device, seed)
        yield f"{gates.operator}, {self}", gates

    def _case(self, lengths: tuple[int, ...], layout: str) -> gdn_cases.ChunkCase:
        return gdn_cases.ChunkCase(
            lengths,
            self.key_heads,
            self.value_heads,
            self.key_size,
            self.value_size,
            str(self.dtype).removeprefix("torch."),
            layout,
            state_dtype=str(self.state_dtype).removeprefix("torch."),
            sliced=True,
        )


def cases(model: Any, as_expected: Expected) -> list[Case]:
    """The tests of a loaded model: each call by each implementation that takes it.

    Args:
        model: A torch module; a layer is what has `A_log`, `conv1d`, `head_k_dim`, `head_v_dim`.
        as_expected: Not needed: the oracle is the recurrence in float64.
    """
    del as_expected
    with _plainly():
        return _cases(model)


def _cases(model: Any) -> list[Case]:
    found = [layer for layer in dict.fromkeys(layers(model)) if layer not in _tried]
    _tried.update(found)
    trials: list[tuple[str, Trial]] = []
    for layer in found:
        seed = secrets.randbelow(2**31)
        trials += [(f"{name} (seed {seed})", trial) for name, trial in layer.trials(seed)]
    # Last: what is made available here stays only where a test of it will run.
    devices = {layer.device.type for layer in found}
    offered = [(device, *pair) for device in devices for pair in _offer(device)]
    made = [_case(name, trial, n) for name, trial in trials for n in _names(trial)]
    served = {(t.device, t.operator, n) for _, t in trials for n in _names(t)}
    for device, operator, name in offered:
        if (device, operator, name) not in served:
            dispatch.unregister(operator, device, name)
    return made


def _offer(device: str) -> list[tuple[str, str]]:
    """Make available what waits for a self-test; with the chunked rule what comes before it."""
    offered = list(selftest.offer(device))
    if device == "npu" and offered:
        for operator, module in ((conv.OPERATOR, conv_triton), (gating.OPERATOR, gating_triton)):
            if operator not in (name for name, _ in offered):
                module.register(device)
                offered.append((operator, module.NAME))
    return offered


def layers(model: Any) -> Iterator[Layer]:
    """The GDN layers of a model whose weights are there."""
    for module in model.modules():
        named = all(
            hasattr(module, name)
            for name in ("A_log", "conv1d", "head_k_dim", "head_v_dim", "num_k_heads")
        )
        weight: Any = getattr(getattr(module, "conv1d", None), "weight", None)
        known = isinstance(weight, torch.Tensor) and weight.dtype in selftest.LIMITS
        if not named or not known or weight.is_meta:
            continue
        ranks = int(getattr(module, "tp_size", 1))
        yield Layer(
            max(1, int(module.num_k_heads) // ranks),
            max(1, int(module.num_v_heads) // ranks),
            int(module.head_k_dim),
            int(module.head_v_dim),
            int(weight.shape[-1]),
            weight.dtype,
            _state_dtype(module),
            weight.device,
        )


def _state_dtype(module: Any) -> torch.dtype:
    try:
        found = module.get_state_dtype()[1]
    except (AttributeError, AssertionError, TypeError):
        return torch.float32
    return found if isinstance(found, torch.dtype) else torch.float32


def _names(trial: Trial) -> list[str]:
    """Who takes the call; a reference only on a CPU, where it serves."""
    on_cpu = trial.device == "cpu"
    return [i.name for i in trial.candidates() if on_cpu or i.name != REFERENCE]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """A model is loaded with defaults of its own, which what is drawn here is not to have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _case(name: str, trial: Trial, implementation: str) -> Case:
    def judged() -> Verdict | None:
        with torch.no_grad(), _plainly():
            if implementation not in _names(trial):
                return None  # withdrawn meanwhile
            with dispatch.only(implementation):
                return trial.judged()

    return Case(f"{name} by {implementation}", judged, partial(_withdraw, trial, implementation))


def _withdraw(trial: Trial, name: str) -> str:
    """Take an implementation out of use; empty where it cannot be, and nothing else serves."""
    dispatch.unregister(trial.operator, trial.device, name)
    with _plainly():
        left = _names(trial)
    if name in left or (not left and trial.device == "cpu"):
        return ""
    return f"{trial.operator} by {name} on {trial.device}"
