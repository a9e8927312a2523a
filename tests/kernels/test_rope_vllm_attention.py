"""Qwen3's and Qwen3-MoE's attention of the installed vLLM, normalised and rotated in one pass.

The device decides whether vLLM's layers take the fused form; here a CPU is let in, and the operator
has its reference. What the layers hand to attention is judged in fp64.
"""

from __future__ import annotations

import importlib
import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import fused_judge  # noqa: E402
import rope_oracle as oracle  # noqa: E402
import rope_vllm  # noqa: E402
from rope_vllm import DTYPES, PLAIN, ROWS, SCALED  # noqa: E402

from ascend_patch.impl import rotary_fused  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.rope import cases, fused_cases  # noqa: E402

FUSED = "ascend_patch::split_qkv_rmsnorm_rope"
TWO_STEPS = "ascend_patch::rotary_embedding"
MODELS = {"qwen3": "Qwen3Attention", "qwen3_moe": "Qwen3MoeAttention"}
HEADS, HEAD_SIZE, HIDDEN = (4, 2), 64, 96
ROPES = {
    **SCALED,
    "MRotaryEmbedding": {**PLAIN, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
}
_prefixes = itertools.count()


class Seen(torch.nn.Module):
    """Stands where attention is, and its KV cache: keeps what it is given."""

    def forward(self, q, k, v):
        self.call = q, k, v
        groups = HEADS[0] // HEADS[1]
        return q + k.repeat(1, groups) - v.repeat(1, groups)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One process that is its own tensor-parallel group: the projections ask for one."""
    rope_vllm.installed("Qwen3Attention.forward")
    from vllm.distributed import parallel_state

    store = tmp_path_factory.mktemp("group") / "store"
    with rope_vllm.vllm_config():
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture
def patched(group, monkeypatch):
    monkeypatch.setattr(rotary_fused, "DEVICES", ("cpu",))
    torch._dynamo.reset()
    with rope_vllm.vllm_config(), rope_vllm.patched(rope_vllm.installed()) as found:
        yield found
    torch._dynamo.reset()


@pytest.fixture
def ran():
    """The operators of ours that ran, in order."""
    seen: list[str] = []
    previous = dispatch.set_observer(seen.append)
    yield seen
    dispatch.set_observer(previous)


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def build(module, generator, dtype=torch.bfloat16, rope=PLAIN, **options):
    """An attention layer with random weights, whose attention keeps what it is given."""
    longest = "max_position" if module == "qwen3" else "max_position_embeddings"
    model = importlib.import_module(f"vllm.model_executor.models.{module}")
    before, attention = torch.get_default_dtype(), model.Attention
    torch.set_default_dtype(dtype)
    # Attention proper wants a model's configuration, which nothing here depends on.
    model.Attention = lambda *_, **__: Seen()
    try:
        layer = getattr(model, MODELS[module])(
            HIDDEN,
            *HEADS,
            rope_parameters=dict(rope),
            head_dim=HEAD_SIZE,
            prefix=f"model.layers.{next(_prefixes)}.self_attn",
            **{longest: ROWS},
            **options,
        )
    finally:
        model.Attention = attention
        torch.set_default_dtype(before)
    for weight in layer.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + 0.5)
    for linear in (layer.qkv_proj, layer.o_proj):
        linear.quant_method.process_weights_after_loading(linear)
    return layer


def inputs(generator, dtype=torch.bfloat16, tokens=33, axes=0):
    shape = (axes, tokens) if axes else (tokens,)
    positions = torch.randint(0, ROWS, shape, generator=generator)
    return positions, torch.randn(tokens, HIDDEN, generator=generator).to(dtype)


def judge(layer, positions, hidden) -> None:
    """Raise AssertionError unless attention was given what the layer's weights say."""
    rotary, by_axis = layer.rotary_emb, positions.dim() == 2
    dtype = str(hidden.dtype).removeprefix("torch.")
    shape = cases.RopeCase(
        hidden.shape[0],
        *HEADS,
        HEAD_SIZE,
        rotary.cos_sin_cache.shape[1],
        rotary.is_neox_style,
        dtype,
        mrope_section=rotary.mrope_section if by_axis else None,
        mrope_interleaved=by_axis and rotary.mrope_interleaved,
    )
    qkv, _ = layer.qkv_proj(hidden)
    call = qkv, positions, rotary.cos_sin_cache, layer.q_norm.weight, layer.k_norm.weight
    case = fused_cases.FusedCase(shape, eps=layer.q_norm.variance_epsilon)
    for got, expected in zip(layer.attn.call, fused_judge.expected(case, call, None), strict=True):
        oracle.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("module", MODELS)
def test_attention_is_given_the_exact_values(patched, ran, module, rope, dtype, generator):
    with torch.no_grad():
        layer = build(module, generator, dtype, ROPES[rope])
        assert type(layer.rotary_emb).__name__ == rope
        for axes in (0, 3) if rope == "MRotaryEmbedding" else (0,):
            positions, hidden = inputs(generator, dtype, axes=axes)
            ran.clear()
            output = layer(positions, hidden)
            assert ran == [FUSED]
            judge(layer, positions, hidden)
            expected, _ = layer.o_proj(Seen()(*layer.attn.call))
            assert torch.equal(output, expected)
            with pytest.raises(AssertionError, match="out of bounds"):
                judge(layer, positions.flip(-1), hidden)


def test_the_release_is_less_exact(group, generator):
    """What is won beside the launches: norm and rotation round once."""
    with rope_vllm.vllm_config(compiled=True), torch.no_grad():
        layer = build("qwen3", generator)
        positions, hidden = inputs(generator)
        layer(positions, hidden)
        with pytest.raises(AssertionError):
            judge(layer, positions, hidden)


def odd_layers():
    """Layers that are not what the fused form is for: what to build, and what to change then."""

    def other_norm(layer):
        layer.q_norm = torch.nn.LayerNorm(HEAD_SIZE, dtype=torch.bfloat16)

    def override(layer):
        layer.k_norm.variance_size_override = 32
        layer.k_norm.forward = lambda x: x[..., :]  # vLLM's own wants another rank then

    def no_weight(layer):
        layer.q_norm.has_weight = False

    def other_eps(layer):
        layer.k_norm.variance_epsilon = 1e-3

    def fp32_weight(layer):
        layer.q_norm.weight.data = layer.q_norm.weight.data.float()
        layer.q_norm.forward = lambda x: x[..., :]  # vLLM's own, on CPU, refuses the mixture

    def other_rotary(layer):
        class Other(type(layer.rotary_emb)):
            pass

        layer.rotary_emb.__class__ = Other

    def dual_chunk(layer):
        layer.dual_chunk_attention_config = {"chunk_size": 8}

    return [other_norm, override, no_weight, other_eps, fp32_weight, other_rotary, dual_chunk]


@pytest.mark.parametrize("change", odd_layers(), ids=lambda change: change.__name__)
def test_an_odd_layer_keeps_two_steps(patched, ran, change, generator):
    with torch.no_grad():
        layer = build("qwen3", generator)
        change(layer)
        original = patched["Qwen3Attention.forward"]._raw
        positions, hidden = inputs(generator)
        output = layer(positions, hidden)
        assert ran == [TWO_STEPS]
        assert torch.equal(output, original(layer, positions, hidden))


def test_another_device_keeps_two_steps(patched, ran, monkeypatch, generator):
    monkeypatch.undo()
    assert "cpu" not in rotary_fused.DEVICES
    with torch.no_grad():
        build("qwen3", generator)(*inputs(generator))
    assert ran == [TWO_STEPS]


@pytest.mark.parametrize("rope", ["RotaryEmbedding", "MRotaryEmbedding"])
@pytest.mark.parametrize("module", MODELS)
def test_compiled_is_eager_and_copies_nothing(patched, module, rope, generator):
    from torch._dynamo.backends.common import aot_autograd

    layer = build(module, generator, rope=ROPES[rope])
    graphs = []

    def keep(graph_module, _example_inputs):
        calls = [n for n in graph_module.graph.nodes if n.op == "call_function"]
        # An operator that is made functional is the wrapper's first argument.
        wrapped = [n.args[:1] if "functionalized" in str(n.target) else () for n in calls]
        graphs.append([f"{n.target} {what}" for n, what in zip(calls, wrapped, strict=True)])
        return graph_module

    compiled = torch.compile(
        layer.forward, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep)
    )
    with torch.no_grad():
        for tokens in (7, 33):
            call = inputs(generator, tokens=tokens, axes=3 if rope == "MRotaryEmbedding" else 0)
            assert torch.equal(compiled(*call), layer(*call))
    for targets in graphs:
        assert len([t for t in targets if "ascend_patch.split_qkv_rmsnorm_rope.default" in t]) == 1
        words = ("clone", "copy", "functionalized", "split_with_sizes", "rsqrt", "slice")
        found = [t for t in targets if any(word in t for word in words)]
        # vLLM's matrix product on CPUs writes to its output.
        assert [t for t in found if "_mm" not in t] == [], found


def test_a_revert_gives_the_two_steps_back(group, ran, monkeypatch, generator):
    monkeypatch.setattr(rotary_fused, "DEVICES", ("cpu",))
    with rope_vllm.vllm_config(compiled=True), torch.no_grad():
        call = inputs(generator)
        with rope_vllm.patched(rope_vllm.installed()):
            layer = build("qwen3", generator)
            layer(*call)
            assert ran == [FUSED]
        ran.clear()
        layer(*call)
        assert ran == []
