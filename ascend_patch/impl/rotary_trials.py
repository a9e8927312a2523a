"""The calls that patch_rotary's self-test makes, from the rotary layers of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.rope import selftest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 7, 257)
# What the longest of them may take on the device, in bytes; there are five tensors of that size.
LONGEST = 1 << 20
# How much of a cache is cast where a layer casts it for its queries.
CAST_ROWS = 1024
AXES = 3
# Names that attention modules of vLLM have for their own rank's heads.
QUERY_HEADS = (
    "num_attention_heads_per_partition",
    "num_heads",
    "num_local_heads",
    "num_attention_heads",
)
HEAD_SIZES = ("hidden_size_per_attention_head", "head_size", "head_dim")
KEY_HEADS = ("num_kv_heads", "num_local_kv_heads", "num_key_value_heads")
FEW_HEADS = (8, 1)


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


def layers(model: Any) -> Iterator[tuple[Shape, tuple[Any, Any]]]:
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


def given_angles(model: Any) -> Iterator[tuple[Shape, Any]]:
    """(shape, owner) of what rotates by given angles: vision towers' attention (ApplyRotaryEmb)."""
    for owner in model.modules():
        for layer in owner.children():
            size = next((n for name in HEAD_SIZES if type(n := getattr(owner, name, 0)) is int), 0)
            weights = [weight for weight in owner.parameters() if weight.dtype in DTYPES]
            named = hasattr(layer, "is_neox_style") and hasattr(layer, "enable_fp32_compute")
            if not named or size <= 0 or size % 2 or not weights or weights[0].is_meta:
                continue
            kind, style, dtype = type(layer).__name__, bool(layer.is_neox_style), weights[0].dtype
            heads = _heads(owner)[0]
            yield Shape(kind, size, size, style, heads, 0, dtype, dtype), owner


def angles_trials(
    shape: Shape, owner: Any, generator: torch.Generator
) -> Iterator[tuple[str, selftest.RopeTrial]]:
    """Query and key of one image in a batch of two, as vLLM's vision towers pass them."""
    device = next(w.device for w in owner.parameters() if w.dtype == shape.dtype)
    width = shape.query_heads * shape.head_size
    longest = max(1, LONGEST // (2 * width * shape.dtype.itemsize))
    for places in sorted({min(places, longest) for places in TOKENS[1:]}):
        x = _random((2 * places, width), shape.dtype, device, generator)
        angle = torch.randn(
            (places, shape.head_size // 2), generator=generator, dtype=torch.float32, device="cpu"
        )
        cos, sin = (part.to(device, shape.dtype) for part in (angle.cos(), angle.sin()))
        trial = selftest.AnglesCall(
            x.view(2, places, shape.query_heads, shape.head_size), cos, sin, shape.is_neox_style
        )
        yield f"{selftest.ANGLES}, {shape}, s {places}", trial


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


def trials(
    shape: Shape, layer: Any, owner: Any, generator: torch.Generator
) -> Iterator[tuple[str, selftest.RopeTrial]]:
    """(name, call) of everything that a rotary layer and its owner can be asked."""
    caches = [layer.cos_sin_cache]
    if shape.cache_dtype != shape.dtype:
        # Releases differ in whether they cast it for their queries, so both are tried.
        caches.append(layer.cos_sin_cache[:CAST_ROWS].to(shape.dtype))
    width = (shape.query_heads + 2 * shape.key_heads) * shape.head_size
    longest = max(1, LONGEST // (width * shape.dtype.itemsize))
    for tokens in sorted({min(tokens, longest) for tokens in TOKENS}):
        for cache in caches:
            trial = call(shape, tokens, generator, cache)
            name = f"{shape}, T {tokens}, cache {cache.dtype}"
            yield f"{selftest.ROTARY}, {name}", trial
            if shape.mrope_section:
                # Text has one row of positions, which is another form of the kernel.
                text = replace(trial, positions=trial.positions[0].contiguous())
                yield f"{selftest.ROTARY}, {name}, text", text
            fused = _fused(shape, owner, trial, generator)
            if fused is not None:
                yield f"{selftest.FUSED}, {name}", fused


def call(shape: Shape, tokens: int, generator: torch.Generator, cache: Tensor) -> selftest.Call:
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
