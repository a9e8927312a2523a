"""patch_attention_router's self-test: each route that a loaded model's layers take, once.

What it is for above all is the edge of a window: whether pre_tokens counts a query's own key is
written in documentation, and seen only where the operator runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ascend_patch._selftest import Case
from ascend_patch.impl import attention_ascend_steps as steps
from ascend_patch.impl import attention_trials as trials
from ascend_patch.kernels.attention import case as attention
from ascend_patch.kernels.attention.route import route
from ascend_patch.kernels.selftest import Verdict

Expected = Callable[[], AbstractContextManager[None]]

# A longer window is tried as if it were this long: its edge is the same, its keys are less memory.
# Of a prompt without a context every key has its query, and the answer on the CPU takes its time.
LONGEST_WINDOW, LONGEST_OF_PREFILL = 4096, 64
# What has been tried in this process: weights that are loaded again are no other layers.
_tried: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Layer:
    """What a route depends on; layers that look alike are tried once.

    Attributes:
        by_release: The release calls the operator for a window itself, and we mend its number.
    """

    configuration: steps.Configuration
    attn_type: str
    pooling: bool
    dtype: torch.dtype
    device: torch.device
    by_release: bool

    def states(self) -> Iterator[tuple[str, bool]]:
        """(state, causal) of the steps that may be ours."""
        if self.attn_type in ("encoder", "encoder_only"):
            yield "prefill", False
        elif self.attn_type == "encoder_decoder":
            yield "chunked", False
        else:
            windowed = self.configuration.window is not None
            yield from [("prefill", True)] * windowed
            yield "chunked", True
            yield from [("decode", True)] * windowed
            if self.pooling and not windowed:
                yield from (("prefill", False), ("chunked", False))


def cases(model: Any, as_expected: Expected) -> list[Case]:
    """The tests of a loaded model.

    Args:
        model: A torch module; a layer is what has an `impl` of the class that is patched.
        as_expected: Not needed: the release's own is what is wrong.
    """
    del as_expected
    made = []
    for layer in dict.fromkeys(_layers(model)):
        for state, causal in layer.states():
            name = (layer, state, causal)
            found, case = _route(layer, state, causal)
            if name in _tried or found.operator == attention.HOST:
                continue
            _tried.add(name)
            seed = secrets.randbelow(2**31)
            trial = trials.Trial(found, case, layer.dtype, layer.device, seed)
            what = f"{found.row} of {layer.configuration} in {state} (seed {seed})"
            place = (found.row, layer.configuration)
            made.append(Case(what, partial(_judged, place, trial), partial(_withdraw, place)))
    return made


def _judged(place: tuple[str, steps.Configuration], trial: trials.Trial) -> Verdict | None:
    if place in steps.withdrawn:
        return None
    with torch.no_grad():
        return trial.judged()


def _withdraw(place: tuple[str, steps.Configuration]) -> str:
    """The release's own answers such steps from now on."""
    steps.withdrawn.add(place)
    row, configuration = place
    return f"the route {row} for {configuration}"


def _route(layer: Layer, state: str, causal: bool) -> tuple[attention.Route, attention.Case]:
    about = layer.configuration
    longest = LONGEST_OF_PREFILL if state == "prefill" else LONGEST_WINDOW
    window = None if about.window is None else min(about.window, longest)
    case = attention.Case(
        state,
        causal=causal,
        head_size=about.head_size,
        num_heads=about.num_heads,
        num_kv_heads=about.num_kv_heads,
        sliding_window=window,
        sinks=about.sinks,
        attn_type=layer.attn_type,
        dtype=str(layer.dtype).removeprefix("torch."),
        max_query_len=1 if state == "decode" else 8,
        soc=steps.system(layer.device),
    )
    if layer.by_release and window is not None:
        # Its call is the same one for any head size.
        return route(replace(case, head_size=128)), case
    return route(case), case


def _layers(model: Any) -> Iterator[Layer]:
    device = next((x.device for x in model.parameters() if not x.is_meta), torch.device("cpu"))
    for module in model.modules():
        impl = getattr(module, "impl", None)
        if impl is None or not steps.is_plain(impl):
            continue
        config = getattr(impl, "vllm_config", None)
        dtype = getattr(module, "kv_cache_torch_dtype", None)
        if config is not None:
            dtype = config.model_config.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            dtype = torch.bfloat16
        pooling = config is not None and config.model_config.runner_type == "pooling"
        yield Layer(
            steps.configuration(impl),
            getattr(impl.attn_type, "value", impl.attn_type),
            pooling,
            dtype,
            device,
            by_release=hasattr(impl, "enable_hamming_sparse"),
        )
