"""patch_rotary's self-test: the kernels at the rotary layers of the loaded model."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascend_patch import _compare, _copies
from ascend_patch._selftest import Case
from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import selftest, triton_call
from ascend_patch.kernels.selftest import Verdict, fault

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 7, 257)
# What the longest of them may take on the device, in bytes; there are five tensors of that size.
LONGEST = 1 << 20
# How much of a cache is cast where a layer casts it for its queries.
CAST_ROWS = 1024
AXES = 3
# Names that attention modules of vLLM have for their own rank's heads.
QUERY_HEADS = ("num_heads", "num_local_heads", "num_attention_heads")
KEY_HEADS = ("num_kv_heads", "num_local_kv_heads", "num_key_value_heads")
FEW_HEADS = (8, 1)

Expected = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Shape:
    """What a kernel sees of a layer; layers that look alike are tried once."""

    kind: str
    head_size: int
    rotary_dim: int
    is_neox_style: bool
    query_heads: int
    key_heads: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False

    def __str__(self) -> str:
        """As messages have it."""
        style = "neox" if self.is_neox_style else "gptj"
        sections = f", sections {list(self.mrope_section)}" if self.mrope_section else ""
        return (
            f"{self.kind}, {style}, {str(self.dtype).removeprefix('torch.')}, heads "
            f"{self.query_heads}:{self.key_heads} of {self.head_size}, rotary_dim "
            f"{self.rotary_dim}{sections}"
        )


# What has been tried in this process: weights that are loaded again are no other layers.
_tried: set[Shape] = set()


def cases(model: Any, as_expected: Expected) -> list[Case]:
    """The tests of a loaded model.

    Args:
        model: A torch module; a layer is what has `cos_sin_cache`, `head_size`, `is_neox_style`.
        as_expected: While it is entered, layers run what ours is held to: the host's own code.
    """
    found = {shape: place for shape, place in _layers(model) if shape not in _tried}
    made: list[Case] = []
    for shape, (layer, owner) in found.items():
        seed = secrets.randbelow(2**31)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, trial in _trials(shape, layer, owner, generator):
            made.append(
                Case(
                    f"{name} (seed {seed})",
                    _without_gradients(trial.judged),
                    partial(_withdraw, trial),
                    partial(_warm, trial),
                )
            )
        call = _call(shape, layer, TOKENS[1], generator, layer.cos_sin_cache)
        whole = partial(_as_a_whole, layer, call, as_expected)
        made.append(Case(f"the layer of {shape} (seed {seed})", _without_gradients(whole)))
    # Last: what is made available here is used only where its tests will run.
    for device in {layer.cos_sin_cache.device.type for layer, _ in found.values()}:
        selftest.offer(device)
    _tried.update(found)
    return made


def _layers(model: Any) -> Iterator[tuple[Shape, tuple[Any, Any]]]:
    """(shape, (layer, the module that owns it)) of every rotary layer whose data is there."""
    for owner in model.modules():
        for layer in owner.children():
            cache = getattr(layer, "cos_sin_cache", None)
            named = hasattr(layer, "head_size") and hasattr(layer, "is_neox_style")
            if not isinstance(cache, Tensor) or not named or cache.dim() != 2 or cache.is_meta:
                continue
            section = tuple(getattr(layer, "mrope_section", None) or ())
            queries, keys = _heads(owner)
            yield (
                Shape(
                    type(layer).__name__,
                    int(layer.head_size),
                    int(cache.shape[1]),
                    bool(layer.is_neox_style),
                    queries,
                    keys,
                    _dtype(layer, owner),
                    cache.dtype,
                    section if len(section) == AXES else (),
                    bool(getattr(layer, "mrope_interleaved", False)),
                ),
                (layer, owner),
            )


def _heads(owner: Any) -> tuple[int, int]:
    """Query and key heads of an attention module, or a few where it does not name them."""
    found = []
    for names, few in zip((QUERY_HEADS, KEY_HEADS), FEW_HEADS, strict=True):
        counts = (getattr(owner, name, None) for name in names)
        found.append(next((n for n in counts if type(n) is int and n > 0), few))
    return found[0], found[1]


def _dtype(layer: Any, owner: Any) -> torch.dtype:
    """The dtype of the layer's queries; weights may be quantised."""
    weights = (weight.dtype for weight in owner.parameters())
    candidates = (getattr(layer, "dtype", None), *weights, layer.cos_sin_cache.dtype)
    return next((dtype for dtype in candidates if dtype in DTYPES), torch.bfloat16)


def _trials(
    shape: Shape, layer: Any, owner: Any, generator: torch.Generator
) -> Iterator[tuple[str, selftest.Call | selftest.FusedCall]]:
    caches = [layer.cos_sin_cache]
    if shape.cache_dtype != shape.dtype:
        # Releases differ in whether they cast it for their queries, so both are tried.
        caches.append(layer.cos_sin_cache[:CAST_ROWS].to(shape.dtype))
    width = (shape.query_heads + 2 * shape.key_heads) * shape.head_size
    longest = max(1, LONGEST // (width * shape.dtype.itemsize))
    for tokens in sorted({min(tokens, longest) for tokens in TOKENS}):
        for cache in caches:
            trial = _call(shape, layer, tokens, generator, cache)
            name = f"{shape}, T {tokens}, cache {cache.dtype}"
            yield f"{selftest.ROTARY}, {name}", trial
            fused = _fused(shape, owner, trial, generator)
            if fused is not None:
                yield f"{selftest.FUSED}, {name}", fused


def _call(
    shape: Shape, layer: Any, tokens: int, generator: torch.Generator, cache: Tensor
) -> selftest.Call:
    """Random queries and keys, slices of one tensor as vLLM's are, at random rows of the cache."""
    queries, keys = (n * shape.head_size for n in (shape.query_heads, shape.key_heads))
    qkv = _random((tokens, queries + 2 * keys), shape.dtype, cache.device, generator)
    rows = (AXES, tokens) if shape.mrope_section else (tokens,)
    positions = torch.randint(0, cache.shape[0], rows, generator=generator, device="cpu")
    # The first row and the last one, where there are tokens for them.
    positions[..., 0], positions[..., -1] = 0, cache.shape[0] - 1
    options = {
        "head_size": shape.head_size,
        "is_neox_style": shape.is_neox_style,
        "mrope_section": list(shape.mrope_section) or None,
        "mrope_interleaved": shape.mrope_interleaved,
    }
    query, key, _ = qkv.split((queries, keys, keys), dim=1)
    return selftest.Call(positions.to(cache.device), query, key, cache, options)


def _fused(
    shape: Shape, owner: Any, call: selftest.Call, generator: torch.Generator
) -> selftest.FusedCall | None:
    """The same with the owner's norms of q and k, if it has such."""
    norms = [getattr(owner, name, None) for name in ("q_norm", "k_norm")]
    weights = [getattr(norm, "weight", None) for norm in norms]
    right = [isinstance(w, Tensor) and w.shape == (shape.head_size,) for w in weights]
    if not all(right) or any(w.device != call.query.device for w in weights if w is not None):
        return None
    width = (shape.query_heads + 2 * shape.key_heads) * shape.head_size
    qkv = _random((call.query.shape[0], width), shape.dtype, call.query.device, generator)
    options = call.options | {
        "num_q_heads": shape.query_heads,
        "num_kv_heads": shape.key_heads,
        "eps": float(getattr(norms[0], "variance_epsilon", 1e-6)),
        "weight_offset": 0.0,
        "has_gate": False,
    }
    tensors = (qkv, call.positions, call.cos_sin_cache, *(w for w in weights if w is not None))
    return selftest.FusedCall(tensors, {}, options)


def _random(
    size: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """From a generator of our own: the server's random numbers stay as they are."""
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(
        device, dtype
    )


def _withdraw(trial: selftest.Call | selftest.FusedCall) -> str:
    """Take what serves a call out of use; empty where nothing else would serve it."""
    if isinstance(trial, selftest.Call):
        operator, device = selftest.ROTARY, trial.query.device.type
    else:
        operator, device = selftest.FUSED, trial.tensors[0].device.type
    served = trial.served()
    if served is None:
        return ""
    dispatch.unregister(operator, device, served.name)
    if trial.served() in (served, None):
        return ""
    return f"{operator} by {served.name} on {device}"


def _warm(trial: selftest.Call | selftest.FusedCall) -> None:
    if isinstance(trial, selftest.Call):
        triton_call.warm(*trial.inputs, **trial.options)


def _without_gradients(function: Callable[[], Verdict]) -> Callable[[], Verdict]:
    def judged() -> Verdict:
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
