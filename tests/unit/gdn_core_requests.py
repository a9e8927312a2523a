"""Requests of a GDN layer, step by step, and what each token's result is, in fp64 from the start.

The oracle knows no cache: a token's result is that of its whole text so far. So whatever a step
should have read of the caches, or should have left in them, shows in the result of some token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from ascend_patch.impl import gdn_metadata

NORM_EPS = 1e-6


@dataclass
class Sizes:
    """A layer's, on one rank; K and V differ, so that a transposed state cannot pass."""

    key_heads: int = 2
    value_heads: int = 4
    key_size: int = 64
    value_size: int = 128
    kernel: int = 4
    drafts: int = 0
    slots: int = 40
    layout: str = "VK"
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size


class World:
    """A layer with random parameters, poisoned caches, and the requests that use them."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self.random = torch.Generator().manual_seed(seed)
        heads = sizes.value_heads
        weight = self.normal(sizes.channels, 1, sizes.kernel) * 0.7
        self.layer = SimpleNamespace(
            conv1d=SimpleNamespace(weight=weight, bias=None),
            activation="silu",
            # A long memory in some heads, a short one in others.
            A_log=torch.linspace(-5, 0.5, heads).to(sizes.dtype),
            dt_bias=self.normal(heads) * 0.5,
        )
        length = sizes.kernel - 1 + sizes.drafts
        # As vLLM lays it out: tokens before channels, seen transposed.
        self.conv_cache = torch.full((sizes.slots, length, sizes.channels), torch.nan)
        self.conv_cache = self.conv_cache.to(sizes.dtype)
        ends = (sizes.key_size, sizes.value_size)
        ends = ends if sizes.layout == "KV" else ends[::-1]
        self.states = torch.full((sizes.slots, heads, *ends), torch.nan).to(sizes.state_dtype)
        self.free = torch.randperm(sizes.slots, generator=self.random).tolist()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.sizes.dtype)

    def request(self) -> Request:
        return Request(self, [self.free.pop() for _ in range(self.sizes.drafts + 1)])

    def tokens(self, count: int) -> Tokens:
        return Tokens(
            self.normal(count, self.sizes.channels),
            self.normal(count, self.sizes.value_heads),
            self.normal(count, self.sizes.value_heads),
        )


@dataclass
class Tokens:
    """Inputs of some tokens: mixed [T, C], b and a [T, HV]."""

    mixed: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor

    def __len__(self) -> int:
        return len(self.mixed)

    def __getitem__(self, which: slice) -> Tokens:
        return Tokens(self.mixed[which], self.b[which], self.a[which])

    def __add__(self, other: Tokens) -> Tokens:
        return joined([self, other])


def joined(parts: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat([getattr(p, n) for p in parts]) for n in ("mixed", "b", "a")))


@dataclass
class Request:
    """A request's slots, one for each token of a speculative step, and its text so far.

    Attributes:
        accepted: Of the last step's tokens, how many are part of the text.
    """

    world: World
    slots: list[int]
    text: Tokens | None = None
    accepted: int = 1

    def takes(self, count: int, *, drafts: bool = False) -> Turn:
        """Let the request have `count` new tokens in the next step."""
        return Turn(self, self.world.tokens(count), drafts)


@dataclass
class Turn:
    """A request's part in a step."""

    request: Request
    new: Tokens
    drafts: bool = False
    expected: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        text = self.request.text
        whole = self.new if text is None else text + self.new
        self.expected = results(self.request.world, whole)[len(whole) - len(self.new) :]

    def keep(self, accepted: int) -> None:
        """After the step: the first so many of its tokens become part of the text."""
        request, kept = self.request, self.new[slice(accepted)]
        request.text = kept if request.text is None else request.text + kept
        request.accepted = accepted if self.drafts else 1


def results(world: World, text: Tokens) -> torch.Tensor:
    """[T, HV, V] in fp64, token by token.

    Source: Qwen3-Next's layer as the model card has it; arXiv:2412.06464, eq. 10.
    """
    sizes, layer = world.sizes, world.layer
    mixed, b, a = (x.double() for x in (text.mixed, text.b, text.a))
    weight = layer.conv1d.weight.double()[:, 0]
    padded = torch.cat((mixed.new_zeros(sizes.kernel - 1, sizes.channels), mixed))
    # A channel's last kernel-1 inputs and this one, the latest with the last weight.
    mixed = sum(padded[i : i + len(mixed)] * weight[:, i] for i in range(sizes.kernel))
    mixed = mixed / (1 + (-mixed).exp())
    keys = sizes.key_heads * sizes.key_size
    q, k, v = mixed.split((keys, keys, sizes.value_heads * sizes.value_size), 1)
    group = sizes.value_heads // sizes.key_heads
    q, k = (x.unflatten(1, (-1, sizes.key_size)).repeat_interleave(group, 1) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for x in (q, k))
    v = v.unflatten(1, (-1, sizes.value_size))
    decay = (-layer.A_log.double().exp() * (1 + (a + layer.dt_bias.double()).exp()).log()).exp()
    beta = 1 / (1 + (-b).exp())
    state = mixed.new_zeros(sizes.value_heads, sizes.key_size, sizes.value_size)
    found = []
    for t in range(len(mixed)):
        state = state * decay[t, :, None, None]
        error = v[t] - (k[t, :, :, None] * state).sum(1)
        state = state + k[t, :, :, None] * (beta[t, :, None] * error)[:, None]
        found.append((q[t, :, :, None] * state).sum(1) * sizes.key_size**-0.5)
    return torch.stack(found)


def metadata_of(turns: list[Turn], *, padding: int = 0) -> SimpleNamespace:
    """A batch's GDNAttentionMetadata, as vLLM's builder fills it.

    Args:
        padding: Requests of no tokens behind the others, as a padded batch has them.
    """
    there = [len(turn.new) for turn in turns] + [0] * padding
    speculative = [turn.drafts for turn in turns] + [False] * padding
    others = [turn for turn in turns if not turn.drafts]
    lengths = [n for n, s in zip(there, speculative, strict=True) if not s]
    slots = [turn.request.slots[0] for turn in others] + [-1] * padding
    drafting = [turn for turn in turns if turn.drafts]
    # One token each, all with a text, and nobody drafts: decode. Beside drafts they are prefill.
    begun = all(turn.request.text is not None for turn in others)
    decode = not drafting and begun and all(n == 1 for n in lengths)
    owners = torch.tensor(speculative).repeat_interleave(torch.tensor(there))
    metadata = SimpleNamespace(
        num_prefills=0 if decode else sum(n > 0 for n in lengths),
        num_decodes=len(lengths) if decode else 0,
        num_spec_decodes=len(drafting),
        num_actual_tokens=sum(there),
        has_initial_state=torch.tensor(
            [turn.request.text is not None for turn in others] + [False] * padding
        ),
        non_spec_state_indices_tensor=torch.tensor(slots, dtype=torch.int32),
        non_spec_query_start_loc=starts(lengths),
        spec_sequence_masks=torch.tensor(speculative) if drafting else None,
        spec_query_start_loc=starts([len(turn.new) for turn in drafting]),
        spec_state_indices_tensor=torch.tensor(
            [turn.request.slots for turn in drafting], dtype=torch.int32
        ),
        num_accepted_tokens=torch.tensor(
            [turn.request.accepted for turn in drafting], dtype=torch.int32
        ),
        spec_token_indx=owners.nonzero()[:, 0].int(),
        non_spec_token_indx=(~owners).nonzero()[:, 0].int(),
    )
    gdn_metadata.attach(metadata, object(), metadata.non_spec_query_start_loc, torch.device("cpu"))
    return metadata


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
