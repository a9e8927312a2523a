"""A release's own metadata builder and attention class on CPU tensors, for any of the releases.

Import it in an environment's process, after torch_npu and vLLM. The configuration is made of plain
namespaces; the forward context is the one that the release asks for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from types import SimpleNamespace

import ascend_attention_oracle
import numpy
import torch
import torch_npu  # noqa: F401  its schemas are the ones that operators have here
import vllm.forward_context as forward_context
import vllm_ascend.attention.attention_v1 as module

from ascend_patch.kernels.npu_ops import surface

BLOCK = 128
State = module.AscendAttentionState
operators = surface.install("2.9.0", allow=("float32",), record=True)
torch.set_num_threads(1)
if hasattr(module, "vanilla_chunked_prefill"):
    # 0.11.0's attention in torch makes tensors on the device itself, so it is only seen here.
    name = "vanilla_chunked_prefill"
    module.vanilla_chunked_prefill = lambda *_: operators.calls.append(surface.Call(name, {}))
# No device has pinned memory here.
torch.Tensor.pin_memory = lambda self, *_: self


@dataclasses.dataclass
class Model:
    """One attention layer of a model, and what the release reads of its configuration."""

    window: int | None = None
    runner: str = "generate"
    heads: int = 4
    kv_heads: int = 2
    size: int = 128
    attn_type: str = "decoder"
    sinks: bool = False
    dtype: str = "float32"
    kind: str = "AscendAttentionBackendImpl"
    seed: int = 0

    def __post_init__(self):
        self.random = torch.Generator().manual_seed(self.seed)
        self.dtype = getattr(torch, self.dtype)
        text = SimpleNamespace(sliding_window=self.window)
        if self.window is None:
            del text.sliding_window
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=4096,
                runner_type=self.runner,
                dtype=self.dtype,
                hf_text_config=text,
                use_mla=False,
                enforce_eager=True,
            ),
            compilation_config=SimpleNamespace(cudagraph_mode=None),
            scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
            parallel_config=SimpleNamespace(
                prefill_context_parallel_size=1, decode_context_parallel_size=1
            ),
            cache_config=SimpleNamespace(block_size=BLOCK),
            speculative_config=None,
            kv_transfer_config=None,
            quant_config=None,
            additional_config={},
        )
        for name, value in {
            "get_current_vllm_config": lambda: self.config,
            "needs_layer_aware_fia_graph_replay": lambda: False,
            "is_enable_hamming_sparse": lambda: False,
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)
        spec = SimpleNamespace(block_size=BLOCK, num_kv_heads=self.kv_heads, head_size=self.size)
        self.builder = module.AscendAttentionMetadataBuilder(
            spec, ["layer"], self.config, torch.device("cpu")
        )
        self.scale = self.size**-0.5
        self.sink_values = self.normal(self.heads) if self.sinks else None
        extra = {"sinks": self.sink_values} if self.sinks else {}
        self.impl = getattr(module, self.kind)(
            self.heads, self.size, self.scale, self.kv_heads, None, self.window, "auto", None,
            self.attn_type, None, **extra,
        )  # fmt: skip
        self.layer = SimpleNamespace(layer_name="layer.0", _k_scale_float=1.0, _v_scale_float=1.0)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random).to(self.dtype)


@dataclasses.dataclass
class Batch:
    """Requests as the scheduler gives them: cached tokens, and tokens of this step."""

    model: Model
    contexts: list[int]
    query_lens: list[int]
    state: str
    causal: bool = True
    capturing: bool = False
    padding: int = 0  # tokens behind the batch's own, as graph sizes and flashcomm add
    dummies: int = 0  # requests that query_start_loc counts and seq_lens does not

    def __post_init__(self):
        model = self.model
        self.total = [c + q for c, q in zip(self.contexts, self.query_lens, strict=True)]
        self.tokens = sum(self.query_lens)
        padded = self.tokens + self.padding
        shape = (model.kv_heads, model.size)
        self.query = model.normal(padded, model.heads, model.size)
        self.keys = [model.normal(n, *shape) for n in self.total]
        self.values = [model.normal(n, *shape) for n in self.total]
        self.blocks = [-(-n // BLOCK) for n in self.total]
        width, count = max([*self.blocks, 1]) + 1, sum(self.blocks) + 3
        # In any order, and what no request owns is never to be read.
        order = torch.randperm(count, generator=model.random).tolist()
        self.cache = [
            torch.full((count, BLOCK, *shape), float("nan")).to(model.dtype) for _ in "kv"
        ]
        self.table = torch.zeros(len(self.total) + self.dummies, width, dtype=torch.int32)
        self.places, self.slots, key, value = [], [], [], []
        for r, n in enumerate(self.total):
            own = [order.pop() for _ in range(self.blocks[r])]
            self.table[r, : len(own)] = torch.tensor(own, dtype=torch.int32)
            slots = [own[t // BLOCK] * BLOCK + t % BLOCK for t in range(n)]
            self.places.append(slots)
            context = self.contexts[r]
            for cache, x in zip(self.cache, (self.keys[r], self.values[r]), strict=True):
                cache.view(-1, *shape)[slots[:context]] = x[:context]
            self.slots += slots[context:]
            key.append(self.keys[r][context:])
            value.append(self.values[r][context:])
        junk = model.normal(self.padding, *shape)
        self.key, self.value = (torch.cat((*x, junk)) for x in (key, value))
        self.slots = torch.tensor([*self.slots, *[0] * self.padding], dtype=torch.int32)

    def metadata(self):
        """What the release's own builder makes of it."""
        lens = [*self.query_lens, *[self.padding] * self.dummies]
        starts = torch.tensor([0, *numpy.cumsum(lens).tolist()], dtype=torch.int32)
        total = torch.tensor(self.total, dtype=torch.int32)
        given = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts,
            "seq_lens": total,
            "seq_lens_cpu": total,
            "_seq_lens_cpu": total,
            "num_computed_tokens_cpu": torch.tensor(self.contexts, dtype=torch.int32),
            "num_reqs": len(lens),
            "num_actual_tokens": self.tokens,
            "num_input_tokens": self.tokens + self.padding,
            "max_query_len": max(lens, default=0),
            "max_seq_len": max(self.total, default=0),
            "decode_token_per_req": 1,
            "block_table_tensor": self.table,
            "slot_mapping": self.slots,
            "actual_seq_lengths_q": starts[1:].tolist(),
            "attn_state": State[self.state],
            "attn_mask": self._mask(),
            "causal": self.causal,
        }
        kind = module.AscendCommonAttentionMetadata
        known = inspect.signature(kind).parameters
        common = kind(**{name: value for name, value in given.items() if name in known})
        return self.model.builder.build(0, common)

    def _mask(self):
        """0.11.0's model runner makes it for the builder; later builders make their own."""
        if self.model.attn_type == "encoder_only":
            return torch.ones(2048, 2048).triu(1).bool()
        if self.state == "PrefillNoCache":
            longest = max(self.total)
            return torch.ones(longest, longest).triu(1).to(self.model.dtype)
        if self.state == "PrefillCacheHit":
            return torch.ones(128, 128).triu(1).to(self.model.dtype)
        return None if self.state == "DecodeOnly" else torch.ones(2048, 2048).triu(1).to(torch.int8)

    def forward(self, metadata=None):
        """The release's forward, as vLLM's operator calls it; what it leaves in `output`."""
        model = self.model
        metadata = self.metadata() if metadata is None else metadata
        output = torch.full_like(self.query, float("nan"))
        context = SimpleNamespace(
            capturing=self.capturing,
            is_draft_model=False,
            is_draft_model_prefill=False,
            attn_metadata={"layer.0": metadata},
        )
        given = {"trace_flag": False} if "trace_flag" in _parameters() else {}
        model.impl.key_cache = model.impl.value_cache = None
        with forward_context.override_forward_context(context):
            model.impl.forward(
                model.layer, self.query, self.key, self.value, self.cache, metadata,
                output=output, **given,
            )  # fmt: skip
        return output

    def expected(self, window="own", sinks="own"):
        """The oracle's answer for the batch's own tokens."""
        parts, at = [], 0
        values = self.model.sink_values if sinks == "own" else sinks
        for r, n in enumerate(self.query_lens):
            parts.append(
                ascend_attention_oracle.attention(
                    self.query[at : at + n].float().numpy(),
                    self.keys[r].float().numpy(),
                    self.values[r].float().numpy(),
                    scale=self.model.scale,
                    causal=self.causal,
                    window=self.model.window if window == "own" else window,
                    sinks=None if values is None else values.float().numpy(),
                )
            )
            at += n
        return numpy.concatenate(parts) if parts else numpy.zeros((0,))

    def error(self, output, **changed):
        """The largest difference; infinite where the release left tokens without a result."""
        got = output[: self.tokens].double().numpy().reshape(self.expected(**changed).shape)
        if numpy.isnan(got).any():
            return float("inf")
        return float(numpy.abs(got - self.expected(**changed)).max(initial=0.0))


def report(case, seed):
    """What a case comes to: its error, what it called, and the bits that it left behind."""
    model, step = case
    batch = Batch(Model(**model, seed=seed), **step)
    operators.calls.clear()
    try:
        output = batch.forward()
    except Exception as fault:
        return {"fault": f"{type(fault).__name__}: {fault}", "calls": calls()}
    found = {"fault": "", "error": batch.error(output), "calls": calls(), "bits": digest(output)}
    window = batch.model.window
    if window is not None:
        found["one more"] = batch.error(output, window=window + 1)
        found["one fewer"] = batch.error(output, window=window - 1)
    return found


def digest(output):
    """Of the bits of a tensor, what nobody wrote included."""
    return hashlib.sha256(output.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def calls():
    """The operators that ran, but for the one that writes the cache, as JSON can hold them."""
    return [_call(c) for c in operators.calls if "reshape_and_cache" not in c.operator]


def _call(call):
    given = call.kwargs
    causal = torch.ones(2048, 2048).triu(1).bool()
    mask = given.get("atten_mask", given.get("mask"))
    is_causal = (
        mask is not None and mask.shape == causal.shape and bool((mask.bool() == causal).all())
    )
    lists = {}
    for name, value in given.items():
        if value is not None and name.startswith(("actual_seq", "seq_len", "context_lens")):
            short = "kv" if "kv" in name or name == "context_lens" else "q"
            lists[short] = [int(x) for x in value]
    return {
        "operator": call.operator.rpartition("::")[2].removesuffix(".default"),
        "layout": given.get("input_layout", ""),
        "mode": given.get("sparse_mode"),
        "mask": "none" if mask is None else "causal" if is_causal else str(list(mask.shape)),
        "before": given.get("pre_tokens", given.get("pre_tockens")),
        "behind": given.get("next_tokens", given.get("next_tockens")),
        "paged": given.get("block_table") is not None,
        **lists,
    }


def _parameters():
    return inspect.signature(module.AscendAttentionBackendImpl.forward).parameters
