"""The reference against the rotary embedding of the vLLM that is installed, in fp32."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import rope  # noqa: E402
from ascend_patch.kernels.rope import cases  # noqa: E402


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
