"""The vLLM that is installed, changed by patch_rotary's own targets, and what judges its layers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import rope_oracle as oracle
import torch

from ascend_patch import _plan, _registry, _versions
from ascend_patch._installation import Installation
from ascend_patch._registry import Band, Symbol
from ascend_patch._seams import make

ROPE = "vllm.model_executor.layers.rotary_embedding"
ROWS = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {
    "RotaryEmbedding": PLAIN,
    "YaRNScalingRotaryEmbedding": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ROWS // 4,
    },
    "Llama3RotaryEmbedding": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ROWS,
    },
}


def installed(seam: str = "") -> Band:
    """The band that patch_rotary decides on here; skips where there is no vLLM to change."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = _versions.find()
    if "vllm" not in found.roots:
        pytest.skip("vllm is not installed")
    if found.host != "vllm":
        pytest.skip(f"the host is {found.host}: {found.host_reason}")
    decision = _plan.decide(_registry.load()["rotary"], found)
    if decision.band is None and found.final_version() is None:
        pytest.skip(f"this vLLM is no final release: {decision.reason}")
    assert decision.state == "armed", decision.reason
    assert decision.band is not None
    if seam and seam not in {target.id.rpartition(":")[2] for target in decision.band.targets}:
        pytest.skip(f"{decision.band.name} has no target {seam}")
    return decision.band


@contextmanager
def patched(band: Band) -> Iterator[dict[str, Installation]]:
    """Every target of a band in place, by its qualified name; given back at the end."""
    installations: dict[str, Installation] = {}
    for target in band.targets:
        importlib.import_module(target.module)
        name = Symbol.parse(target.symbol).qualname
        installations[name] = make(target, lambda: None)
        installations[name].prepare()
    try:
        for installation in installations.values():
            installation.install()
        yield installations
    finally:
        for installation in reversed(installations.values()):
            installation.revert()


@contextmanager
def vllm_config(*, compiled: bool = False) -> Iterator[None]:
    """A configuration with vLLM's custom operators on (eager) or off (as compiled models have)."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = CompilationConfig(custom_ops=["none" if compiled else "all"])
    with set_current_vllm_config(VllmConfig(compilation_config=config)):
        importlib.import_module(ROPE)._ROPE_DICT.clear()
        yield
        importlib.import_module(ROPE)._ROPE_DICT.clear()


def build(head_size: int, dtype: torch.dtype, neox: bool, parameters: dict) -> torch.nn.Module:
    """A layer as a model gets it. Layers bind their forward when they are built: patch before."""
    return importlib.import_module(ROPE).get_rope(
        head_size, ROWS, neox, rope_parameters=dict(parameters), dtype=dtype
    )


def inputs(seed: int, tokens: int, heads: tuple[int, int], head_size: int, dtype: torch.dtype):
    """positions [T], and query and key as slices of one qkv tensor."""
    generator = torch.Generator().manual_seed(seed)
    query, key = heads[0] * head_size, heads[1] * head_size
    qkv = torch.randn(tokens, query + 2 * key, generator=generator).to(dtype)
    positions = torch.randint(0, ROWS, (tokens,), generator=generator)
    return positions, qkv[:, :query], qkv[:, query : query + key]


def judge(layer, positions, call, result, *, negated: bool = False) -> None:
    """Raise AssertionError unless result is the rotation of (query, key) by the layer's cache."""
    cache = layer.cos_sin_cache
    if negated:
        half = cache.shape[1] // 2
        cache = torch.cat((cache[:, :half], -cache[:, half:]), dim=1)
    sections = getattr(layer, "mrope_section", None)
    phase = oracle.phases(
        positions, cache, sections, sections is not None and layer.mrope_interleaved
    )
    for got, x in zip(result, call, strict=True):
        assert (got is None) == (x is None)
        if x is not None:
            assert got.shape == x.shape
            assert got.dtype == x.dtype
            oracle.assert_close(got, oracle.rotate(x, phase, layer.head_size, layer.is_neox_style))


def is_wrong(layer, positions, call, result) -> bool:
    """Whether the judge rejects a result: the control of what it accepts."""
    with suppress(AssertionError):
        judge(layer, positions, call, result)
        return False
    return True
