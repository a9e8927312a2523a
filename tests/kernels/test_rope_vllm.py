"""patch_rotary on the rotary classes of the installed vLLM, and our reference beside them."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import rope_vllm  # noqa: E402
from rope_vllm import DTYPES, PLAIN, SCALED  # noqa: E402

from ascend_patch.kernels import rope  # noqa: E402
from ascend_patch.kernels.rope import cases  # noqa: E402

NATIVE = "RotaryEmbedding.forward_native"
SECTIONS = {
    "chunked": {**PLAIN, "mrope_section": [16, 24, 24]},
    "interleaved": {**PLAIN, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "partial": {**PLAIN, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
}


@pytest.fixture(scope="module")
def vllm_rope():
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    pytest.importorskip("vllm", reason="vllm is not installed")
    name = "vllm.model_executor.layers.rotary_embedding"
    layer = pytest.importorskip(name, reason=f"{name} is missing from this vLLM")
    if not hasattr(layer.RotaryEmbedding, "forward_static"):
        pytest.skip("this vLLM has no RotaryEmbedding.forward_static")
    return layer


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(128, 128), (80, 32), (192, 96)])
@pytest.mark.parametrize("key_heads", [2, None])
def test_equals_forward_static(vllm_rope, is_neox_style, head_size, rotary_dim, key_heads, seed):
    case = cases.RopeCase(
        33, 6, key_heads, head_size, rotary_dim, is_neox_style, "float32", from_qkv=False
    )
    positions, query, key, cache = cases.make_inputs(case, seed)
    got = rope.rotary_embedding(positions, query, key, cache, **case.options)
    expected = vllm_rope.RotaryEmbedding.forward_static(
        positions, query, key, head_size, rotary_dim, cache, is_neox_style
    )
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("section", [(24, 20, 20), (16, 24, 24)])
def test_interleaved_sections_equal_vllms(vllm_rope, section, seed):
    """[16, 24, 24] asks for more turns than 64 frequencies have: both sides drop the excess."""
    name = "vllm.model_executor.layers.rotary_embedding.mrope"
    module = pytest.importorskip(name, reason=f"{name} is missing from this vLLM")
    if not hasattr(module, "apply_interleaved_rope"):
        pytest.skip("this vLLM has no apply_interleaved_rope")
    case = cases.RopeCase(
        17,
        4,
        2,
        128,
        128,
        dtype="float32",
        from_qkv=False,
        mrope_section=section,
        mrope_interleaved=True,
    )
    positions, query, key, cache = cases.make_inputs(case, seed)
    got, _ = rope.rotary_embedding(positions, query, key, cache, **case.options)
    angles = cache[positions]
    cos, sin = (module.apply_interleaved_rope(a, list(section)) for a in angles.chunk(2, dim=-1))
    per_token = torch.cat((cos, sin), dim=-1)
    expected, _ = vllm_rope.RotaryEmbedding.forward_static(
        torch.arange(17), query, None, 128, 128, per_token, True
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- the patched classes ------------------------------------------------------------------------


@pytest.fixture
def band():
    return rope_vllm.installed()


@pytest.fixture
def installations(band):
    torch._dynamo.reset()
    with rope_vllm.patched(band) as found:
        yield found
    torch._dynamo.reset()


@pytest.fixture(params=[False, True], ids=["operators", "native"])
def config(request):
    """Custom operators on, as eager servers have them, and off, as compiled models do."""
    with rope_vllm.vllm_config(compiled=request.param):
        yield "forward_native" if request.param else "forward_cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("name", SCALED)
def test_each_class_rotates_exactly(band, installations, config, name, neox, dtype, seed):
    layer = rope_vllm.build(96, dtype, neox, SCALED[name])
    assert type(layer).__name__ == name
    positions, query, key = rope_vllm.inputs(seed, 33, (6, 2), 96, dtype)
    before = query.clone(), key.clone()
    for call in ((query, key), (query, None)):
        result = layer(positions, *call)
        rope_vllm.judge(layer, positions, call, result)
        with pytest.raises(AssertionError, match="out of bounds"):
            rope_vllm.judge(layer, positions, call, result, negated=True)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("text", [False, True], ids=["image", "text"])
@pytest.mark.parametrize("name", SECTIONS)
def test_sections_rotate_exactly(band, installations, config, name, text, neox, dtype, seed):
    layer = rope_vllm.build(128, dtype, neox, SECTIONS[name])
    assert type(layer).__name__ == "MRotaryEmbedding"
    positions, *call = rope_vllm.inputs(seed, 33, (6, 2), 128, dtype)
    if not text:
        positions = torch.stack((positions, positions.flip(0), positions // 2))
    result = layer(positions, *call)
    rope_vllm.judge(layer, positions, call, result)
    if not text:
        other = positions[[0, 2, 1]]
        assert rope_vllm.is_wrong(layer, other, call, result), "height and width make no difference"


@pytest.mark.parametrize("name", ["plain", *SECTIONS])
def test_the_release_rounds_every_product(band, name, seed):
    """What the patch is for: without it, the torch form is not within one ulp in bfloat16."""
    with rope_vllm.vllm_config(compiled=True):
        layer = rope_vllm.build(128, torch.bfloat16, True, SECTIONS.get(name, PLAIN))
        positions, *call = rope_vllm.inputs(seed, 65, (6, 2), 128, torch.bfloat16)
        if name != "plain":
            positions = torch.stack((positions, positions.flip(0), positions // 2))
        assert rope_vllm.is_wrong(layer, positions, call, layer(positions, *call))


def test_gptj_pairs_under_sections_on_cuda(seed):
    """MRotaryEmbedding.forward_cuda: on CPU tensors ours runs, and the original has no Triton."""
    band = rope_vllm.installed("MRotaryEmbedding.forward_cuda")
    with rope_vllm.vllm_config(), rope_vllm.patched(band):
        layer = rope_vllm.build(128, torch.bfloat16, False, SECTIONS["partial"])
        positions, *call = rope_vllm.inputs(seed, 33, (6, 2), 128, torch.bfloat16)
        positions = torch.stack((positions, positions.flip(0), positions // 2))
        rope_vllm.judge(layer, positions, call, layer.forward_cuda(positions, *call))
        neox = rope_vllm.build(128, torch.bfloat16, True, SECTIONS["partial"])
        with pytest.raises(Exception, match=r"(?i)triton|not callable|subscriptable|driver"):
            neox.forward_cuda(positions, *call)


def apply_layer(**options):
    module = pytest.importorskip(f"{rope_vllm.ROPE}.common", reason="vllm is not installed")
    if not hasattr(module, "ApplyRotaryEmb"):
        pytest.skip("this vLLM has no ApplyRotaryEmb")
    return module.ApplyRotaryEmb(**options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("shape", [(33, 4, 80), (2, 33, 4, 80)], ids=["s h d", "b s h d"])
def test_given_angles_rotate_exactly(band, installations, config, shape, neox, dtype, seed):
    from rope_oracle import assert_close, rotate

    layer = apply_layer(is_neox_style=neox)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    angle = torch.randn(33, 40, generator=generator)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got = layer(x, cos, sin)
    assert got.dtype == dtype
    assert got.shape == x.shape
    phase = (cos.double() + 1j * sin.double()).numpy()
    # q and k of a vision tower come in one call, one behind the other along the batch.
    for part, expected in zip(got.reshape(-1, 33, 4, 80), x.reshape(-1, 33, 4, 80), strict=True):
        assert_close(part, rotate(expected, phase, 80, neox))
        with pytest.raises(AssertionError, match="out of bounds"):
            assert_close(part, rotate(expected, phase.conj(), 80, neox))


def test_a_layer_that_asks_for_fp32_keeps_its_arithmetic(band, installations, config, seed):
    layer = apply_layer(enable_fp32_compute=True)
    x = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    angle = torch.linspace(0, 1, 9 * 32).view(9, 32)
    expected = layer.forward_static(x, angle.cos(), angle.sin(), True, True)
    assert torch.equal(layer(x, angle.cos(), angle.sin()), expected)


def test_a_subclass_with_its_own_forward_keeps_it(band, installations, config, seed):
    base = type(rope_vllm.build(64, torch.float32, True, PLAIN))

    class Own(base):
        def forward_native(self, positions, query, key=None):
            return query + 1, key

    layer = Own(64, 64, rope_vllm.ROWS, 10000.0, True, torch.float32)
    positions, query, key = rope_vllm.inputs(seed, 5, (2, 1), 64, torch.float32)
    if config == "forward_native":
        assert torch.equal(layer(positions, query, key)[0], query + 1)
        return
    # vLLM's kernel writes to its inputs; our functional operator would not.
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        call = query.clone(), key.clone()
        got, _ = run(positions, *call)
        assert torch.equal(got, call[0])
        assert not torch.equal(got, query)


@pytest.mark.parametrize("name", ["plain", "interleaved"])
def test_compiled_is_eager_and_has_one_node(band, installations, config, name, seed):
    from torch._dynamo.backends.common import aot_autograd

    layer = rope_vllm.build(128, torch.bfloat16, True, SECTIONS.get(name, PLAIN))

    def model(positions, qkv):
        query, key, value = qkv.split([6 * 128, 2 * 128, 2 * 128], dim=-1)
        query, key = layer(positions, query, key)
        return query * 2, key * 2, value

    graphs = []

    def keep(graph_module, _example_inputs):
        graphs.append([str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"])
        return graph_module

    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep)
    )
    for tokens in (7, 33):
        positions, query, _ = rope_vllm.inputs(seed, tokens, (6, 2), 128, torch.bfloat16)
        if name != "plain":
            positions = torch.stack((positions, positions.flip(0), positions // 2))
        with torch.no_grad():
            got, expected = (run(positions, query._base) for run in (compiled, model))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    for targets in graphs:
        assert targets.count("ascend_patch.rotary_embedding.default") == 1
        copies = [t for t in targets if any(w in t for w in ("clone", "copy", "functionalized"))]
        assert copies == []


def test_a_revert_gives_the_originals_back(band, seed):
    from ascend_patch._installation import owner_of
    from ascend_patch._registry import Symbol

    def found():
        pairs = {t.symbol: owner_of(Symbol.parse(t.symbol)) for t in band.targets}
        return {symbol: vars(owner)[name] for symbol, (owner, name) in pairs.items()}

    with rope_vllm.patched(band):
        ours = found()
    with rope_vllm.vllm_config(compiled=True):
        before = found()
        layer = rope_vllm.build(128, torch.bfloat16, True, PLAIN)
        call = rope_vllm.inputs(seed, 65, (6, 2), 128, torch.bfloat16)
        expected = layer(*call)
        with rope_vllm.patched(band):
            assert not any(found()[symbol] is raw for symbol, raw in before.items())
            patched = rope_vllm.build(128, torch.bfloat16, True, {**PLAIN, "rope_theta": 10001.0})
            assert type(patched).forward_native is found()[band.targets[0].symbol]
        assert found() == before
        assert not any(before[symbol] is raw for symbol, raw in ours.items())
        assert torch.equal(layer(*call)[0], expected[0])
        # A layer that was built meanwhile holds ours, which has stepped aside.
        original = before[band.targets[0].symbol]
        assert torch.equal(patched(*call)[0], original(patched, *call)[0])
