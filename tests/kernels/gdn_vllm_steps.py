"""Real builder and layers of the installed vLLM on a GPU, patched by gdn_attn's own targets.

The layers are instances of vLLM's class with what its `_forward_core` reads; the builder is vLLM's
own, over a configuration that has no more than it asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ascend_patch import _plan, _registry
from ascend_patch._registry import Symbol
from ascend_patch._seams import make
from ascend_patch._versions import Installed

DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
PREFIX = "model.layers.{}.linear_attn"
LAYERS, SLOTS, DRAFTS, WIDTH = 4, 96, 2, 4


@dataclass(frozen=True)
class Sizes:
    """A layer's, on one rank. K and V differ, so that a transposed state cannot pass."""

    key_heads: int = 4
    value_heads: int = 8
    key_size: int = 64
    value_size: int = 128

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size


# Qwen3-Next's on one GPU.
LARGE = Sizes(16, 32, 128, 128)


@dataclass(frozen=True)
class Batch:
    """For each request its tokens, its context, and its drafts (-1: it has none)."""

    lengths: tuple[int, ...]
    context: tuple[int, ...]
    drafts: tuple[int, ...] | None = None


PREFILL = Batch((65, 1, 700, 64), (0, 64, 128, 0))
WITH_DECODE = Batch((1, 1, 130), (40, 7, 0))
WITH_DRAFTS = Batch((3, 130, 1, 2), (50, 0, 64, 9), (2, -1, -1, 1))
DRAFTS_ALONE = Batch((3, 2), (50, 9), (2, 1))
DECODE = Batch((1, 1, 1), (40, 7, 9))
LARGE_PREFILL = Batch((1024,) * 8, (0,) * 8)


def band() -> _registry.Band:
    """What gdn_attn would change in this vLLM."""
    import vllm

    release = vllm.__version__.partition("+")[0]
    assert vllm.__file__ is not None
    root = Path(vllm.__file__).parent.parent
    installed = Installed({"vllm": release}, {"vllm": root}, "vllm", device="cuda")
    decision = _plan.decide(_registry.load()["gdn_attn"], installed)
    assert decision.state == "armed", decision.reason
    assert decision.band is not None
    return decision.band


@contextmanager
def patched(found: _registry.Band) -> Iterator[None]:
    """Both targets in place."""
    installations = []
    for target in found.targets:
        importlib.import_module(target.module)
        installations.append(make(target, lambda: None))
        installations[-1].prepare()
    try:
        for installation in installations:
            installation.install()
        yield
    finally:
        for installation in reversed(installations):
            installation.revert()


class Model:
    """Layers with random parameters, their caches, and the builder of their group."""

    def __init__(self, sizes: Sizes, seed: int, *, drafts: int = 0) -> None:
        self.sizes, self.drafts = sizes, drafts
        self.random = torch.Generator(DEVICE).manual_seed(seed)
        self.on_host = torch.Generator().manual_seed(seed)
        self.layers = [self._layer(number) for number in range(LAYERS)]
        self.builder = self._builder()

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=self.random).to(dtype or DTYPE)

    def _layer(self, number: int) -> Any:
        from vllm.model_executor.models import qwen3_next

        sizes = self.sizes
        cls = qwen3_next.Qwen3NextGatedDeltaNet
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        operator = qwen3_next.ChunkGatedDeltaRule.__new__(qwen3_next.ChunkGatedDeltaRule)
        torch.nn.Module.__init__(operator)
        operator._forward_method = operator.forward_native
        weight = self.normal(sizes.channels, 1, WIDTH) * 0.5
        fields = {
            "prefix": PREFIX.format(number),
            "tp_size": 1,
            "num_k_heads": sizes.key_heads,
            "num_v_heads": sizes.value_heads,
            "head_k_dim": sizes.key_size,
            "head_v_dim": sizes.value_size,
            "key_dim": sizes.key_heads * sizes.key_size,
            "value_dim": sizes.value_heads * sizes.value_size,
            "conv_kernel_size": WIDTH,
            "num_spec": self.drafts,
            "activation": "silu",
            "conv1d": SimpleNamespace(weight=weight, bias=None),
            "A_log": torch.linspace(-4, 1, sizes.value_heads, device=DEVICE),
            "dt_bias": self.normal(sizes.value_heads, dtype=torch.float32),
            "enable_packed_recurrent_decode": True,
            "model_config": SimpleNamespace(dtype=DTYPE),
            "cache_config": SimpleNamespace(
                mamba_cache_dtype="auto", mamba_ssm_cache_dtype="float32"
            ),
            "chunk_gated_delta_rule": operator,
        }
        for name, value in fields.items():
            object.__setattr__(layer, name, value)
        conv = self.normal(SLOTS, WIDTH - 1 + self.drafts, sizes.channels)
        state = (sizes.value_heads, sizes.value_size, sizes.key_size)
        states = 0.3 * self.normal(SLOTS, *state, dtype=torch.float32)
        object.__setattr__(layer, "kv_cache", [(conv, states)])
        return layer

    def _builder(self) -> Any:
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
        from vllm.v1.kv_cache_interface import MambaSpec

        spec = MambaSpec(
            block_size=16,
            shapes=((1,), (1,)),
            dtypes=(torch.float32,),
            num_speculative_blocks=self.drafts,
        )
        speculation = SimpleNamespace(num_speculative_tokens=self.drafts, parallel_drafting=False)
        config = SimpleNamespace(
            speculative_config=speculation if self.drafts else None,
            compilation_config=SimpleNamespace(
                cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False),
                max_cudagraph_capture_size=64,
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=64),
            cache_config=SimpleNamespace(mamba_cache_mode="none"),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        return GDNAttentionMetadataBuilder(spec, ["layer"], config, DEVICE)

    def caches(self) -> list[torch.Tensor]:
        return [cache for layer in self.layers for cache in layer.kv_cache[0]]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is done to the caches meanwhile is undone."""
        before = [cache.clone() for cache in self.caches()]
        yield
        for cache, old in zip(self.caches(), before, strict=True):
            cache.copy_(old)

    def step(self, batch: Batch) -> Step:
        return Step(self, batch)


class Step:
    """A batch, as the model runner hands it over: fresh tensors, nothing derived yet."""

    def __init__(self, model: Model, batch: Batch) -> None:
        self.model, self.batch = model, batch
        requests, columns = len(batch.lengths), model.drafts + 1
        order = torch.randperm(SLOTS, generator=model.on_host)[: requests * columns]
        self.slots = order.view(requests, columns).int()
        self.accepted = torch.ones(requests, dtype=torch.int32)
        tokens = sum(batch.lengths)
        sizes = model.sizes
        self.inputs = [
            (
                model.normal(tokens, sizes.channels),
                model.normal(tokens, sizes.value_heads),
                model.normal(tokens, sizes.value_heads),
            )
            for _ in range(LAYERS)
        ]
        self.again()

    def again(self) -> None:
        """New tensors of the same batch, which no cache by identity knows."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = self.batch
        lengths, context = (torch.tensor(x).int() for x in (batch.lengths, batch.context))
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = lengths.cumsum(0)
        self.common = CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts,
            seq_lens=(lengths + context).to(DEVICE),
            num_reqs=len(lengths),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int((lengths + context).max()),
            block_table_tensor=self.slots.to(DEVICE),
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
        )
        self.drafts = None if batch.drafts is None else torch.tensor(batch.drafts).int()
        self.accepted_there = self.accepted.to(DEVICE)
        heads = (self.model.sizes.value_heads, self.model.sizes.value_size)
        self.out = [
            torch.full((int(starts[-1]), *heads), torch.nan, dtype=DTYPE, device=DEVICE)
            for _ in range(LAYERS)
        ]

    def build(self) -> Any:
        """The metadata, by the builder as it is now."""
        drafts = () if self.drafts is None else (self.accepted_there, self.drafts)
        return self.model.builder.build(0, self.common, *drafts)

    def layers(self, metadata: Any) -> list[torch.Tensor]:
        """Every layer's `_forward_core`, as it is now; their results."""
        from vllm.forward_context import override_forward_context

        context = SimpleNamespace(
            attn_metadata={layer.prefix: metadata for layer in self.model.layers},
            virtual_engine=0,
        )
        with override_forward_context(context):
            for layer, (mixed, b, a), out in zip(
                self.model.layers, self.inputs, self.out, strict=True
            ):
                # The release's convolution of a decode step writes its results over its inputs.
                layer._forward_core(mixed_qkv=mixed.clone(), b=b, a=a, core_attn_out=out)
        return self.out

    def run(self) -> list[torch.Tensor]:
        return self.layers(self.build())


def layer_symbol(found: _registry.Band) -> str:
    """The layer's target, as messages name it."""
    (target,) = (t for t in found.targets if "_forward" in t.symbol)
    return Symbol.parse(target.symbol).qualname
