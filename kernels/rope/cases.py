"""The calls that tests and benchmarks of kernels/rope share.

A case is plain data, dtypes are names: it prints as a test id and makes its inputs on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class RopeCase:
    """One call of rotary_embedding; ``positions`` is sorted, random, repeated or maximal."""

    tokens: int
    query_heads: int
    key_heads: int | None
    head_size: int
    rotary_dim: int
    is_neox_style: bool = True
    dtype: str = "bfloat16"
    cache_dtype: str = "float32"
    positions: str = "random"
    positions_dtype: str = "int64"
    max_position: int = 512
    from_qkv: bool = True
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    text_only: bool = False
    name: str = ""

    def __str__(self) -> str:
        """A readable test or benchmark id."""
        if self.name:
            return f"{self.name}-T{self.tokens}"
        parts = [
            "neox" if self.is_neox_style else "gptj",
            self.dtype,
            f"D{self.head_size}r{self.rotary_dim}",
            f"H{self.query_heads}:{self.key_heads}",
            f"T{self.tokens}",
            f"cache-{self.cache_dtype}",
            f"{self.positions}-{self.positions_dtype}",
            "qkv" if self.from_qkv else "contiguous",
        ]
        if self.mrope_section:
            style = "interleaved" if self.mrope_interleaved else "chunked"
            parts.append(f"mrope{'-'.join(map(str, self.mrope_section))}-{style}")
            parts += ["text"] if self.text_only else []
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        return {
            "head_size": self.head_size,
            "is_neox_style": self.is_neox_style,
            "mrope_section": list(self.mrope_section) if self.mrope_section else None,
            "mrope_interleaved": self.mrope_interleaved,
        }


# (head_size, rotary_dim): whole heads and partial ones, powers of two and not.
HEADS = (
    (64, 64),
    (64, 32),
    (80, 80),
    (80, 32),
    (96, 96),
    (128, 128),
    (128, 64),
    (128, 80),
    (128, 96),
    (192, 192),
    (192, 64),
    (256, 64),
    (256, 192),
)
STYLES = (True, False)
DTYPES = ("bfloat16", "float16", "float32")
HEAD_COUNTS = ((1, 1), (12, 1), (32, 8), (64, 4), (64, 64), (12, None))
TOKENS = (0, 1, 7, 257)
POSITIONS = ("random", "repeated", "sorted", "maximal")

# (section, head_size, rotary_dim): Qwen2-VL's, Qwen3-VL's, and a partial rotary as in GLM-4.1V. In
# those height and width are equal; the last one tells the two apart.
MROPE = (
    ((16, 24, 24), 128, 128),
    ((24, 20, 20), 128, 128),
    ((8, 12, 12), 128, 64),
    ((25, 16, 7), 96, 96),
)


def correctness_cases() -> list[RopeCase]:
    """Style x dtype x head size in full, twice; the other axes take turns.

    Layouts (head counts, strides, tokens) are met in every combination, and so are angles (cache
    dtype, kind and dtype of positions); which meets which drifts from round to round.
    """
    calls = [*product(STYLES, DTYPES, HEADS)] * 2
    layouts = [*product(HEAD_COUNTS, (True, False), TOKENS)]
    angles = [*product(("bfloat16", "float32", None), POSITIONS, ("int64", "int32"))]
    cases: list[RopeCase] = []
    for n, (style, dtype, (head_size, rotary_dim)) in enumerate(calls):
        # Strides without a common factor with the lengths: consecutive cases differ in each axis.
        (query_heads, key_heads), from_qkv, tokens = layouts[n * 29 % len(layouts)]
        cache_dtype, positions, integer = angles[(n * 7 + n // len(layouts)) % len(angles)]
        cases.append(
            RopeCase(
                tokens=tokens,
                query_heads=query_heads,
                key_heads=key_heads,
                head_size=head_size,
                rotary_dim=rotary_dim,
                is_neox_style=style,
                dtype=dtype,
                cache_dtype=cache_dtype or dtype,
                positions=positions,
                positions_dtype=integer,
                from_qkv=from_qkv,
            )
        )
    return cases


def mrope_cases() -> list[RopeCase]:
    """Sections x chunked or interleaved x style x image or text positions."""
    cases: list[RopeCase] = []
    for section, head_size, rotary_dim in MROPE:
        for interleaved in (False, True):
            for style in STYLES:
                for text_only in (False, True):
                    n = len(cases)
                    cases.append(
                        RopeCase(
                            tokens=(7, 0, 257, 1, 33)[n % 5],
                            query_heads=12,
                            key_heads=(2, None)[n % 7 == 3],
                            head_size=head_size,
                            rotary_dim=rotary_dim,
                            is_neox_style=style,
                            dtype=DTYPES[n % 3],
                            cache_dtype=("float32", "bfloat16")[(n // 2) % 2],
                            positions_dtype=("int64", "int32")[(n // 4) % 2],
                            from_qkv=n % 4 < 3,
                            mrope_section=section,
                            mrope_interleaved=interleaved,
                            text_only=text_only,
                        )
                    )
    return cases


def upstream_cases() -> list[RopeCase]:
    """The shapes of the tests that vllm-ascend's Triton kernel came with; tokens take turns."""
    shapes = product(STYLES, DTYPES[:2], (64, 128), (32, 64))
    return [
        RopeCase(
            tokens=(1, 4, 8, 16, 1024)[n % 5],
            query_heads=64,
            key_heads=1,
            head_size=head_size,
            rotary_dim=rotary_dim,
            is_neox_style=style,
            dtype=dtype,
            cache_dtype=dtype,
            max_position=2**18,
        )
        for n, (style, dtype, head_size, rotary_dim) in enumerate(shapes)
    ]


def large_cases() -> list[RopeCase]:
    """Few long prefills: enough elements for a fault that is rare, or tied to a large index."""
    return [
        RopeCase(4096, 1, 1, 128, 128, max_position=4096, positions="sorted"),
        RopeCase(4096, 12, 1, 96, 96, False, "float16", max_position=4096),
        RopeCase(4096, 4, 1, 80, 80, True, "float32", max_position=4096, positions_dtype="int32"),
    ]


def serving_cases() -> list[RopeCase]:
    """What models ask for, at a decode batch and at a prefill chunk: the benchmark's table."""
    cases: list[RopeCase] = []
    for tokens in (1, 64, 4096):
        shared: dict[str, Any] = {
            "tokens": tokens,
            "max_position": 32768,
            "cache_dtype": "bfloat16",
        }
        cases += [
            RopeCase(
                query_heads=32,
                key_heads=8,
                head_size=128,
                rotary_dim=128,
                name="llama-3-8b",
                **shared,
            ),
            RopeCase(
                query_heads=32, key_heads=32, head_size=80, rotary_dim=32, name="phi-2", **shared
            ),
            RopeCase(
                query_heads=32,
                key_heads=2,
                head_size=128,
                rotary_dim=64,
                is_neox_style=False,
                name="glm-4-9b",
                **shared,
            ),
            RopeCase(
                query_heads=28,
                key_heads=4,
                head_size=128,
                rotary_dim=128,
                mrope_section=(16, 24, 24),
                name="qwen2-vl-7b",
                **shared,
            ),
            RopeCase(
                query_heads=32,
                key_heads=8,
                head_size=128,
                rotary_dim=128,
                mrope_section=(24, 20, 20),
                mrope_interleaved=True,
                name="qwen3-vl-8b",
                **shared,
            ),
        ]
    return cases


def make_cache(case: RopeCase, device: str | torch.device = "cpu", base: float = 1e4) -> Tensor:
    """The cos_sin_cache of a case: [max_position, rotary_dim] in its cache dtype."""
    import torch

    exponent = torch.arange(0, case.rotary_dim, 2, dtype=torch.float64) / case.rotary_dim
    position = torch.arange(case.max_position, dtype=torch.float64)
    angle = torch.outer(position, base**-exponent)
    cache = torch.cat((angle.cos(), angle.sin()), dim=1)
    return cache.to(device, getattr(torch, case.cache_dtype))


def make_inputs(
    case: RopeCase, seed: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(positions, query, key, cos_sin_cache) of a case, the same for the same seed.

    query is [T, Hq*D] and key [T, Hk*D] or None; with ``from_qkv`` they are slices of one
    [T, (Hq + 2 Hk) * D] tensor.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    query_width = case.query_heads * case.head_size
    key_width = (case.key_heads or 0) * case.head_size
    qkv = torch.randn(case.tokens, query_width + 2 * key_width, generator=generator)
    qkv = qkv.to(device, dtype)
    query = qkv[:, :query_width]
    key = qkv[:, query_width : query_width + key_width]
    if not case.from_qkv:
        query, key = query.contiguous(), key.contiguous()
    positions = _make_positions(case, generator).to(device)
    return positions, query, None if case.key_heads is None else key, make_cache(case, device)


def _make_positions(case: RopeCase, generator: torch.Generator) -> Tensor:
    import torch

    with_rows = case.mrope_section is not None and not case.text_only
    shape = (3, case.tokens) if with_rows else (case.tokens,)
    highest = case.max_position - 1
    if case.positions == "maximal":
        positions = torch.full(shape, highest)
    elif case.positions == "repeated":
        positions = torch.randint(0, min(3, highest) + 1, shape, generator=generator)
    else:
        positions = torch.randint(0, highest + 1, shape, generator=generator)
    if case.positions == "sorted":
        positions = positions.sort(dim=-1).values
    return positions.to(getattr(torch, case.positions_dtype))
