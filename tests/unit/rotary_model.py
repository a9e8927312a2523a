"""A model's rotary layers, as vLLM builds them, for patch_rotary's self-test."""

from __future__ import annotations

import contextlib

import torch

from ascend_patch import _selftest
from ascend_patch.impl import rotary_selftest
from ascend_patch.kernels import rope


class Rotary(torch.nn.Module):
    """A layer as vLLM builds it; its forward is ours, or with `own` one of the host's."""

    def __init__(self, size=64, rotary_dim=64, neox=True, dtype=torch.bfloat16, section=None):
        super().__init__()
        self.head_size, self.is_neox_style, self.dtype = size, neox, dtype
        if section:
            self.mrope_section, self.mrope_interleaved = list(section), False
        angle = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(0, rotary_dim, 2) / size))
        self.register_buffer("cos_sin_cache", torch.cat((angle.cos(), angle.sin()), 1).to(dtype))
        self.own = None

    def forward(self, positions, query, key):
        if self.own is not None:
            return self.own(positions, query, key)
        section = getattr(self, "mrope_section", None) if positions.dim() == 2 else None
        return rope.rotary_embedding(
            positions,
            query,
            key,
            self.cos_sin_cache,
            head_size=self.head_size,
            is_neox_style=self.is_neox_style,
            mrope_section=section,
        )


class Attention(torch.nn.Module):
    def __init__(self, layer, heads=4, kv_heads=2, norm=0):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.rotary_emb = heads, kv_heads, layer
        if norm:
            self.q_norm, self.k_norm = torch.nn.Module(), torch.nn.Module()
            for module in (self.q_norm, self.k_norm):
                module.weight = torch.nn.Parameter(torch.rand(norm))
                module.variance_epsilon = 1e-5


def model(*attentions):
    return torch.nn.Sequential(*attentions)


@contextlib.contextmanager
def as_expected():
    yield


def run(it, expected=as_expected):
    return _selftest.run(rotary_selftest.cases(it, expected))


def names(it):
    return [case.name for case in rotary_selftest.cases(it, as_expected)]
