"""The calls that tests and benchmarks of kernels/gdn share.

A case is plain data, dtypes are names: it prints as a test id and makes its inputs on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ChunkCase:
    """One call of chunk_gated_delta_rule.

    Attributes:
        lengths: Of the sequences, in tokens.
        decay: The strongest log decay of a token; g is drawn from -decay to 0.
        states: `none`; `initial`, given states; or `cache`, slots of which some are new and one,
            where there are three sequences or more, is missing.
        sliced: q, k and v are slices of one wider row, slots are a column, as a model's are.
        tail: Tokens behind the last sequence.
    """

    lengths: tuple[int, ...]
    key_heads: int = 2
    value_heads: int = 4
    key_size: int = 128
    value_size: int = 128
    dtype: str = "bfloat16"
    layout: str = "VK"
    states: str = "cache"
    state_dtype: str = "float32"
    decay: float = 1.0
    normalise: bool = True
    sliced: bool = False
    tail: int = 0
    name: str = ""

    def __str__(self) -> str:
        """A readable test or benchmark id."""
        heads = f"H{self.key_heads}:{self.value_heads}"
        if self.name:
            return f"{self.name}-{heads}"
        parts = [
            self.dtype,
            "+".join(map(str, self.lengths)) or "nothing",
            heads,
            f"K{self.key_size}V{self.value_size}",
            self.layout,
            self.states if self.states == "none" else f"{self.states}-{self.state_dtype}",
            f"decay{self.decay:g}",
        ]
        parts += [] if self.normalise else ["given-lengths"]
        parts += ["sliced"] if self.sliced else []
        parts += [f"tail{self.tail}"] if self.tail else []
        return "-".join(parts)

    @property
    def tokens(self) -> int:
        """Of all sequences and the tail."""
        return sum(self.lengths) + self.tail

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[HV, V, K] or [HV, K, V], as the layout says."""
        last = self.key_size, self.value_size
        first, second = last if self.layout == "KV" else last[::-1]
        return self.value_heads, first, second


# Around the chunk of 64, a long one, and sequences without tokens at every place.
RAGGED = (0, 1, 63, 0, 64, 65, 127, 0)
LONG = (4097,)
DTYPES = ("bfloat16", "float16")
LAYOUTS = ("VK", "KV")
SIZES = ((128, 128), (64, 128), (128, 64), (64, 64), (256, 256), (256, 64), (64, 256))
STATES = (("cache", "float32"), ("initial", "float32"), ("cache", "bfloat16"), ("none", "float32"))
DECAYS = (1.0, 20.0, 1e-4)
HEADS = ((1, 1), (2, 4), (1, 3))

# Key and value heads of Qwen3-Next-80B-A3B on each rank, by the tensor-parallel size.
TENSOR_PARALLEL = {1: (16, 32), 2: (8, 16), 4: (4, 8), 8: (2, 4)}
# 32 requests in one step.
MIXED = (
    *(389, 178, 350, 410, 194, 18, 119, 445, 235, 224, 187, 424, 362, 382, 140, 446),
    *(220, 165, 269, 411, 418, 100, 233, 64, 130, 64, 348, 44, 285, 369, 116, 436),
)
# What a step of a serving engine holds: a long prompt, several, many.
BATCHES = {
    "1x8192": (8192,),
    "8x1024": (1024,) * 8,
    "32-mixed": MIXED,
    "1x2048": (2048,),
    "64x32": (32,) * 64,
    "1x32768": (32768,),
}


def correctness_cases() -> list[ChunkCase]:
    """Sizes x layouts x states in full; the other axes take turns, and each meets each other."""
    axes = [*product(SIZES, LAYOUTS, STATES)]
    others = [*product(DECAYS, HEADS, DTYPES)]
    cases: list[ChunkCase] = []
    for n, ((key_size, value_size), layout, (states, state_dtype)) in enumerate(axes):
        decay, (key_heads, value_heads), dtype = others[n * 7 % len(others)]
        cases.append(
            ChunkCase(
                RAGGED if n % 3 else (64, 200, 1),
                key_heads,
                value_heads,
                key_size,
                value_size,
                dtype,
                layout,
                states,
                state_dtype,
                decay,
                normalise=n % 5 != 4,
                sliced=n % 2 == 1,
                tail=3 * (n % 7 == 2),
            )
        )
    return cases


def edge_cases() -> list[ChunkCase]:
    """One sequence of every length that a chunk's edge is near to, and batches without tokens."""
    cases = [ChunkCase((n,), 1, 2, sliced=True) for n in (1, 63, 64, 65, 127, 128)]
    cases += [ChunkCase((0, 0)), ChunkCase((0,), states="none"), ChunkCase((3,) * 40, 1, 1)]
    return cases


def long_cases() -> list[ChunkCase]:
    """A prompt whose errors have time to grow, under strong, common and hardly any decay."""
    case = ChunkCase(LONG, 1, 2)
    return [replace(case, decay=d, dtype=t) for d, t in product(DECAYS, DTYPES)]


def serving_cases(sizes: tuple[int, ...] = tuple(TENSOR_PARALLEL)) -> list[ChunkCase]:
    """What a rank of Qwen3-Next is asked for, by tensor-parallel size: the benchmark's table."""
    return [
        ChunkCase(
            lengths, *TENSOR_PARALLEL[size], states="initial", sliced=True, name=f"{name}-tp{size}"
        )
        for size, (name, lengths) in product(sizes, BATCHES.items())
    ]


def make_inputs(case: ChunkCase, seed: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The arguments of a case's call, the same for the same seed; chunk_metadata is among them.

    Keys are drawn normal and so have about the same length; where the call does not normalise them,
    they are given with a length of about 1, without which the rule does not converge.
    """
    import torch

    from ascend_patch.kernels.gdn.metadata import build_chunk_metadata

    generator = torch.Generator().manual_seed(seed)
    heads = case.key_heads, case.key_heads, case.value_heads
    widths = [n * size for n, size in zip(heads, _sizes(case), strict=True)]
    room = sum(widths) + 32 * case.sliced
    qkv = torch.randn(case.tokens, room, generator=generator)
    if not case.normalise:
        qkv[:, widths[0] : 2 * widths[0]] *= case.key_size**-0.5
    qkv = qkv.to(device, getattr(torch, case.dtype))
    parts = qkv[:, : sum(widths)].split(widths, -1)
    q, k, v = (
        (part if case.sliced else part.contiguous()).unflatten(-1, (n, -1))[None]
        for part, n in zip(parts, heads, strict=True)
    )
    shape = 1, case.tokens, case.value_heads
    g = -case.decay * torch.rand(shape, generator=generator).square()
    beta = torch.rand(shape, generator=generator)
    starts = torch.tensor([0, *case.lengths]).cumsum(0)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": g.to(device),
        # Hosts differ in whether they round it.
        "beta": beta.to(device, v.dtype if case.sliced else torch.float32),
        "state_layout": case.layout,
        "use_qk_l2norm_in_kernel": case.normalise,
        "chunk_metadata": build_chunk_metadata(starts, torch.device(device)),
    }
    return {**arguments, **_states(case, generator, device)}


def _column(x: Tensor, device: str | torch.device) -> Tensor:
    """``x`` on a device as a column of a table, which a block table's first is."""
    column: Tensor = x[:, None].repeat(1, 2).to(device)[:, 0]
    return column


def _sizes(case: ChunkCase) -> tuple[int, int, int]:
    return case.key_size, case.key_size, case.value_size


def _states(
    case: ChunkCase, generator: torch.Generator, device: str | torch.device
) -> dict[str, Tensor]:
    import torch

    count = len(case.lengths)
    if case.states == "none":
        return {}
    spare = 3 if case.states == "cache" else 0
    held = torch.randn(count + spare, *case.state_shape, generator=generator)
    held = held.to(device, getattr(torch, case.state_dtype))
    if case.states == "initial":
        return {"initial_state": held}
    slots = torch.randperm(count + spare, generator=generator)[:count].to(torch.int32)
    if count > 2:
        slots[1] = -1
    carried = torch.rand(count, generator=generator) < 0.6
    return {
        "state": held,
        "state_indices": _column(slots, device) if case.sliced else slots.to(device),
        "has_initial_state": carried.to(device),
    }
