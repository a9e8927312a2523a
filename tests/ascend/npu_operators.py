"""torch_npu's operators on CPU tensors, behind their real schemas and with their documented limits.

Import it after torch_npu. Arithmetic is float32, rounded once. `used` names what ran.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401  it defines the operators

used: list[str] = []


def _half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def npu_rms_norm(x, weight, epsilon=1e-6):
    used.append("npu_rms_norm")
    wide = x.float()
    size = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * size * weight.float()).to(x.dtype), size


def npu_rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    used.append("npu_rotary_mul")
    assert rotary_mode == "half"
    assert rotate is None
    assert x.dim() == r1.dim() == 4, "BSND with 1S1D"
    assert r1.shape == r2.shape
    batch, tokens, heads, size = x.shape
    assert size < 896
    assert size % 2 == 0
    assert max(batch, heads) < 1000, "B and N must be below 1000"
    assert r1.shape == (1, tokens, 1, size), f"1S1D of {tuple(x.shape)}, not {tuple(r1.shape)}"
    return (x.float() * r1.float() + _half(x.float()) * r2.float()).to(x.dtype)


def npu_mrope(
    positions,
    query,
    key,
    cos_sin_cache,
    head_size,
    *,
    mrope_section=None,
    rotary_mode="half",
    cache_mode="default",
):
    used.append("npu_mrope")
    assert rotary_mode == "half"
    assert query.dim() == key.dim() == 2
    assert query.dtype == cos_sin_cache.dtype
    assert head_size % 32 == 0
    rows = cos_sin_cache[positions].float()
    cos, sin = rows.chunk(2, dim=-1)
    if any(mrope_section):
        # [3, T, half] -> [T, half]: time's columns, then height's, then width's.
        cos, sin = (
            torch.cat([part[axis] for axis, part in enumerate(x.split(mrope_section, -1))], -1)
            for x in (cos, sin)
        )
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in (cos, sin))
    return tuple(
        (heads * cos + _half(heads) * sin).flatten(1).to(query.dtype)
        for heads in (x.float().unflatten(-1, (-1, head_size)) for x in (query, key))
    )


def _npu_rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox_style):
    """In place, as vLLM's rotary_embedding: a head's first elements turn, as wide as the cache."""
    used.append("_npu_rotary_embedding")
    width = cos_sin_cache.shape[1]
    cos, sin = (x.float()[:, None] for x in cos_sin_cache[positions].chunk(2, -1))
    for x in (query, key):
        heads = x.view(x.shape[0], -1, head_size)
        part = heads[..., :width].float()
        if is_neox_style:
            first, second = part.chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        else:
            first, second = part[..., ::2], part[..., 1::2]
            both = (first * cos - second * sin, second * cos + first * sin)
            turned = torch.stack(both, -1).flatten(-2)
        heads[..., :width] = turned.to(x.dtype)


def npu_apply_rotary_pos_emb(query, key, cos, sin, layout="BSND", rotary_mode="half"):
    """It changes its inputs, which its schema does not say: 0.11.0 counts on that."""
    used.append("npu_apply_rotary_pos_emb")
    assert rotary_mode == "half"
    assert query.shape[-1] == cos.shape[-1] == 128
    for x in (query, key):
        x.copy_(x.float() * cos.float() + _half(x.float()) * sin.float())
    return query.clone(), key.clone()


_libraries = []
for namespace, functions in (
    ("npu", (npu_rms_norm, npu_rotary_mul, npu_mrope, npu_apply_rotary_pos_emb)),
    ("atb", (_npu_rotary_embedding,)),
):
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    for function in functions:
        library.impl(function.__name__, function, "CPU")
