"""A GDN layer of a release, and its metadata builder, step by step on CPU tensors.

Import it in an environment's process, after torch_npu and vLLM. Builder, block tables and layers
are the release's own; what it runs on an NPU only has the meaning that is documented:
vllm-ascend's convolution (csrc/causal_conv1d of v0.18.0) and torch_npu's recurrent rule.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from types import SimpleNamespace

import ascend_fla
import device_reads
import torch
import torch_npu  # noqa: F401  it defines the operators
import vllm.forward_context as forward_context
import vllm_ascend.patch.worker  # noqa: F401  it assigns into vLLM's classes
from gdn_core_requests import Sizes, Turn, World
from torch import nn
from vllm.v1.attention.backends import gdn_attn
from vllm.v1.kv_cache_interface import MambaSpec
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata
from vllm_ascend.worker.block_table import BlockTable

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import (
    chunk,
    conv,
    conv_reference,
    gating,
    gating_reference,
    reference,
)

PREFIX = "model.layers.0.linear_attn"
CPU = torch.device("cpu")
torch.set_num_threads(1)
torch.Tensor.pin_memory = lambda self, *_: self
# To the device, which is the CPU; torch_npu's own would look for one.
torch.Tensor.npu = lambda self, *_, **__: self


def _modules():
    for name in ("chunk", "sigmoid_gating"):
        yield importlib.import_module(f"vllm_ascend.ops.triton.fla.{name}")


# --- what only an NPU has -----------------------------------------------------------------------

CONV_SCHEMA = (
    "npu_causal_conv1d_custom(Tensor x, Tensor weight, Tensor conv_state, Tensor? bias_opt, "
    "int[] query_start_loc_opt, int[] cache_indices_opt, int[] initial_state_mode_opt, "
    "int[] num_accepted_tokens_opt, int activation_mode, int pad_slot_id, int run_mode) -> Tensor"
)


def causal_conv1d(x, weight, state, bias, starts, slots, carried, accepted, activation, pad, mode):
    """x [T, C], weight [W, C], state [slots, L, C]: prefill, sequence by sequence."""
    assert (mode, list(accepted)) == (0, [])
    # The least that aclnn would refuse: a list for each sequence.
    assert len(starts) == len(slots) + 1 == len(carried) + 1, (starts, slots, carried)
    width, out = weight.shape[0], torch.empty_like(x)
    for n, (start, end) in enumerate(itertools.pairwise(starts)):
        if slots[n] == pad:
            continue
        before = state[slots[n], : width - 1].float()
        if not carried[n]:
            before = torch.zeros_like(before)
        if start == end:
            continue
        rows = torch.cat((before, x[start:end].float()))
        total = sum(rows[j : j + end - start] * weight[j].float() for j in range(width))
        total = total if bias is None else total + bias.float()
        out[start:end] = (total * torch.sigmoid(total) if activation else total).to(x.dtype)
        state[slots[n], : width - 1] = rows[-(width - 1) :].to(state.dtype)
    return out


def recurrent_gated_delta_rule(
    query, key, value, state, *, beta=None, scale=None, actual_seq_lengths=None,
    ssm_state_indices=None, num_accepted_tokens=None, g=None, gk=None,
):  # fmt: skip
    """State [slots, HV, V, K]; a sequence's tokens keep a state each."""
    assert gk is None
    group = value.shape[1] // key.shape[1]
    q, k = (x.float().repeat_interleave(group, 1) for x in (query, key))
    v, out, at = value.float(), torch.zeros_like(value), 0
    lengths = actual_seq_lengths.tolist()
    # A release may hand over query_start_loc's differences of all sequences, or of one token each.
    for n, length in enumerate(lengths):
        first = at if num_accepted_tokens is None else at + int(num_accepted_tokens[n]) - 1
        held = state[ssm_state_indices[first]].float()
        for t in range(at, at + length):
            held = held * g[t].float().exp()[:, None, None]
            change = beta[t].float()[:, None] * (v[t] - (held * k[t][:, None]).sum(-1))
            held = held + change[:, :, None] * k[t][:, None]
            out[t] = ((held * q[t][:, None]).sum(-1) * scale).to(out.dtype)
            state[ssm_state_indices[t]] = held.to(state.dtype)
        at += length
    return out


def _install() -> list:
    ascend = torch.library.Library("_C_ascend", "FRAGMENT")
    ascend.define(CONV_SCHEMA)
    ascend.impl("npu_causal_conv1d_custom", causal_conv1d, "CPU")
    npu = torch.library.Library("npu", "IMPL")
    npu.impl("npu_recurrent_gated_delta_rule", recurrent_gated_delta_rule, "CPU")
    ascend_fla.install()
    torch.npu.device = lambda *_: contextlib.nullcontext()
    alone = SimpleNamespace(world_size=1, rank_in_group=0)
    for module in _modules():
        if hasattr(module, "get_pcp_group"):
            module.get_pcp_group = lambda: alone
    properties = importlib.import_module("vllm_ascend.ops.triton.triton_utils")
    properties._NUM_VECTORCORE = properties._NUM_AICORE = 4
    # The torch references, as what a device runs.
    for operator, run in (
        (chunk.OPERATOR, reference.run),
        (conv.OPERATOR, conv_reference.run),
        (gating.OPERATOR, gating_reference.run),
    ):
        kernel = dispatch.Implementation("kernel", device_reads.as_kernel(run), priority=1)
        dispatch.register(operator, "cpu", kernel)
    return [ascend, npu]


_libraries = _install()


# --- a model's runner ---------------------------------------------------------------------------


class Model:
    """One layer of a class, its builder, and the runner's block table.

    Args:
        kind: `qwen3_next` or `qwen3_5`.
        layout: Of the states; `KV in VK` keeps [K, V] in a cache whose shape says [V, K].
    """

    def __init__(self, kind: str, seed: int, layout: str, **sizes) -> None:
        self.layout = layout
        sizes.setdefault("dtype", torch.float16)
        self.sizes = Sizes(layout=layout[:2], **sizes)
        self.world = World(self.sizes, seed)
        self.layer = self._layer(kind)
        own = self.sizes
        spec = MambaSpec(
            block_size=64, shapes=((1,), (1,)), dtypes=(torch.float16, torch.float32),
            num_speculative_blocks=own.drafts,
        )  # fmt: skip
        self.config = self._config()
        self.config.compilation_config.static_forward_context = {PREFIX: self.layer}
        self.builder = gdn_attn.GDNAttentionMetadataBuilder(spec, [PREFIX], self.config, CPU)
        self.table = self._block_table()

    def _config(self):
        own = self.sizes
        drafting = SimpleNamespace(num_speculative_tokens=own.drafts, parallel_drafting=False)
        text = SimpleNamespace(linear_num_value_heads=own.value_heads)
        return SimpleNamespace(
            compilation_config=SimpleNamespace(
                cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False),
                max_cudagraph_capture_size=64,
            ),
            speculative_config=drafting if own.drafts else None,
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=4096),
            cache_config=SimpleNamespace(mamba_cache_mode="none"),
            model_config=SimpleNamespace(
                hf_text_config=text, get_num_attention_heads=lambda _: own.value_heads
            ),
            parallel_config=SimpleNamespace(
                tensor_parallel_size=1, prefill_context_parallel_size=1,
                decode_context_parallel_size=1,
            ),
        )  # fmt: skip

    def _layer(self, kind: str):
        own, names = self.sizes, ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet")
        module = importlib.import_module(f"vllm.model_executor.models.{kind}")
        owner = getattr(module, names[kind == "qwen3_5"])
        layer = owner.__new__(owner)
        nn.Module.__init__(layer)
        drawn = self.world.layer
        layer.conv1d, layer.activation, layer.prefix = drawn.conv1d, "silu", PREFIX
        layer.A_log, layer.dt_bias = drawn.A_log.float(), drawn.dt_bias
        layer.tp_size, layer.num_spec = 1, own.drafts
        layer.num_k_heads, layer.num_v_heads = own.key_heads, own.value_heads
        layer.head_k_dim, layer.head_v_dim = own.key_size, own.value_size
        layer.key_dim = own.key_heads * own.key_size
        layer.value_dim = own.value_heads * own.value_size
        states = self.world.states
        if self.layout == "KV in VK":
            states = states.view(*states.shape[:2], states.shape[3], states.shape[2])
        layer.kv_cache = [(self.world.conv_cache, states)]
        return layer

    def _block_table(self):
        table = BlockTable(64, 16, self.sizes.drafts + 1, 4096, False, CPU, [64])
        # What earlier requests left behind.
        table.block_table.cpu.fill_(31)
        table.block_table.gpu.fill_(31)
        return table

    def common(self, turns: list[Turn], padding: int = 0):
        """What the runner gives the builder, and the host's tensors among it."""
        count = len(turns)
        for row, turn in enumerate(turns):
            self.table.add_row(turn.request.slots, row)
        self.table.commit_block_table(count)
        rows = self.table.get_device_tensor()[: count + padding]
        rows[count:].fill_(0)
        lengths = [len(turn.new) for turn in turns] + [0] * padding
        texts = [turn.request.text for turn in turns]
        before = [0 if text is None else len(text) for text in texts] + [0] * padding
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        context = torch.tensor(before, dtype=torch.int32)
        seq_lens = context + starts.diff()
        common = AscendCommonAttentionMetadata(
            query_start_loc=starts.clone(),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.clone(),
            seq_lens_cpu=seq_lens,
            num_computed_tokens_cpu=context,
            num_reqs=len(lengths),
            num_actual_tokens=sum(lengths),
            max_query_len=max(lengths),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=rows,
            slot_mapping=torch.empty(0),
        )
        drafts = [len(turn.new) - 1 if turn.drafts else -1 for turn in turns] + [-1] * padding
        extra = {}
        if any(turn.drafts for turn in turns):
            accepted = [turn.request.accepted for turn in turns] + [1] * padding
            extra["num_accepted_tokens"] = torch.tensor(accepted, dtype=torch.int32)
            extra["num_decode_draft_tokens_cpu"] = torch.tensor(drafts, dtype=torch.int32)
        return common, extra

    def build(self, turns: list[Turn], padding: int = 0):
        """The batch's metadata, and how often building it read the device."""
        common, extra = self.common(turns, padding)
        device = [common.query_start_loc, common.seq_lens, self.table.block_table.gpu]
        device += [x for name, x in extra.items() if not name.endswith("cpu")]
        with device_reads.counted(device) as reads:
            metadata = self.builder.build(0, common, **extra)
        return metadata, reads

    def step(self, turns: list[Turn], padding: int = 0):
        """Build and run: what the tokens got, [T, HV, V], and both counts of reads."""
        metadata, built = self.build(turns, padding)
        return self.forward(turns, metadata), built

    def forward(self, turns: list[Turn], metadata):
        new = [turn.new for turn in turns]
        mixed, b, a = (torch.cat([getattr(x, name) for x in new]) for name in ("mixed", "b", "a"))
        pad = [x.new_full((3, *x.shape[1:]), torch.nan) for x in (mixed, b, a)]
        mixed, b, a = (torch.cat(pair) for pair in zip((mixed, b, a), pad, strict=True))
        own = self.sizes
        out = torch.full((len(mixed), own.value_heads, own.value_size), torch.nan, dtype=own.dtype)
        context = SimpleNamespace(
            attn_metadata={PREFIX: metadata}, virtual_engine=0,
            cudagraph_runtime_mode=importlib.import_module("vllm.config").CUDAGraphMode.NONE,
        )  # fmt: skip
        with forward_context.override_forward_context(context), device_reads.counted() as reads:
            self.layer._forward_core(mixed, b, a, out)
        assert out[len(mixed) - 3 :].isnan().all(), "padding was written to"
        self.reads = reads
        return out[: len(mixed) - 3]
