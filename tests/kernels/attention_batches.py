"""Batches for kernels/attention: what is asked, in plain data, and tensors with traps in them.

A slot of the cache that no request holds is NaN, and so is the output before the call. Blocks are
in random order, some are shared, table entries behind a request's last block name poisoned blocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import attention_oracle as oracle
import numpy as np
import torch

from ascend_patch.kernels.attention.attend import Batch, attend
from ascend_patch.kernels.attention.case import Case, Route

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "blocks first", "heads first")


@dataclass(frozen=True)
class Asked:
    """One batch: ``queries`` and ``contexts`` are lengths of its requests, in tokens.

    ``dummies`` are padded requests that have queries and no length; ``spare`` rows of the tensors
    belong to nobody. ``shared`` requests begin with the blocks of the first one.
    """

    state: str
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    causal: bool = True
    head_size: int = 128
    num_kv_heads: int = 1
    group: int = 1
    window: int | None = None
    sinks: bool = False
    attn_type: str = "decoder"
    dtype: str = "float32"
    kv_dtype: str = "auto"
    block_size: int = 16
    layout: str = "contiguous"
    shared: tuple[int, ...] = ()
    dummies: int = 0
    spare: int = 0
    capturing: bool = False
    soc: str = "emulated"
    seed: int = 0

    @property
    def lens(self) -> list[int]:
        """Keys of each request."""
        if self.attn_type == "encoder_decoder":
            return list(self.contexts)
        return [q + c for q, c in zip(self.queries, self.contexts, strict=True)]

    @property
    def case(self) -> Case:
        """The question that the router is asked."""
        return Case(
            self.state,
            causal=self.causal,
            head_size=self.head_size,
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            sliding_window=self.window,
            sinks=self.sinks,
            attn_type=self.attn_type,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            max_query_len=max(self.queries, default=0),
            min_query_len=min(self.queries, default=0),
            max_seq_len=max(self.lens, default=0),
            batch=len(self.queries),
            padded=bool(self.dummies or self.spare),
            capturing=self.capturing,
            soc=self.soc,
        )


@dataclass
class Made:
    """The tensors of one batch; ``keys`` and ``values`` are each request's own, never cached."""

    asked: Asked
    query: Any
    key: Any
    value: Any
    key_cache: Any
    value_cache: Any
    table: Any
    sinks: Any
    keys: list[Any]
    values: list[Any]
    num_tokens: int
    ends: list[int]

    @property
    def batch(self) -> Batch:
        """As a host's metadata has it: padded requests among the ends, not among the lengths."""
        tokens = self.ends[-1] if self.ends else 0
        ends = [*self.ends, *(tokens + i + 1 for i in range(self.asked.dummies))]
        return Batch(ends, self.asked.lens, self.table, self.num_tokens)

    def answer(self, route: Route, batch: Batch | None = None) -> Any:
        """The output of ``attend``, rows of nobody included; all NaN before the call."""
        out = torch.full_like(self.query, float("nan"))
        attend(
            route,
            batch or self.batch,
            self.query,
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            out,
            num_heads=self.query.shape[1],
            num_kv_heads=self.asked.num_kv_heads,
            head_size=self.asked.head_size,
            scale=self.asked.head_size**-0.5,
            sinks=self.sinks,
        )
        return out

    def judge(self, out: Any) -> str:
        """What is wrong with an output, or nothing."""
        asked, start = self.asked, 0
        encoder = asked.attn_type != "decoder"
        for request, end in enumerate(self.ends):
            want = oracle.one_request(
                self.query[start:end],
                self.keys[request],
                self.values[request],
                scale=asked.head_size**-0.5,
                causal=asked.causal and not encoder,
                window=asked.window,
                sinks=self.sinks,
            )
            if not oracle.is_close(out[start:end], want):
                found = np.abs(out[start:end].double().numpy() - want).max()
                return f"request {request} is off by {found}"
            start = end
        if not bool((out[start : self.num_tokens] == 0).all()):
            return "a row of no request is not 0"
        if not bool(out[self.num_tokens :].isnan().all()):
            return "a row past num_tokens was written"
        return ""


def make(asked: Asked) -> Made:
    """Tensors for ``asked``, the same for the same seed."""
    generator = torch.Generator().manual_seed(asked.seed)
    dtype = DTYPES[asked.dtype]

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = (asked.num_kv_heads, asked.head_size)
    keys = [normal(length, *heads) for length in asked.lens]
    values = [normal(length, *heads) for length in asked.lens]
    size = asked.block_size
    counts = [-(-length // size) for length in asked.lens]
    width = max(counts, default=0) + 2
    blocks = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    poisoned = blocks.pop()
    table = torch.full((len(counts) + 1, width), poisoned, dtype=torch.int32)
    for request, count in enumerate(counts):
        own = [blocks.pop() for _ in range(count)]
        if request in asked.shared:
            # Whole blocks of context that both have: the prefix that was cached once.
            common = min(asked.contexts[0], asked.contexts[request]) // size
            own[:common] = table[0, :common].tolist()
            for mine in (keys, values):
                mine[request][: common * size] = mine[0][: common * size]
        table[request, :count] = torch.tensor(own, dtype=torch.int32)
    caches = _caches(asked, sum(counts) + 3, dtype)
    for cache, mine in zip(caches, (keys, values), strict=True):
        for request, length in enumerate(asked.lens):
            where = torch.arange(length)
            cache[table[request, where // size].long(), where % size] = mine[request]
    ends = np.cumsum(asked.queries).astype(int).tolist()
    tokens = ends[-1] if ends else 0
    num_tokens = tokens + asked.dummies + asked.spare
    rows = num_tokens + asked.spare
    query = normal(rows, heads[0] * asked.group, heads[1])
    cross = asked.attn_type == "encoder_decoder"
    new = [x[:0] if cross else x[c:] for x, c in zip(keys, asked.contexts, strict=True)]
    newer = [x[:0] if cross else x[c:] for x, c in zip(values, asked.contexts, strict=True)]
    padding = torch.full((rows - sum(map(len, new)), *heads), float("nan"), dtype=dtype)
    # As a slice of the fused projection: not contiguous.
    fused = torch.stack((torch.cat((*new, padding)), torch.cat((*newer, padding))), dim=1)
    sinks = normal(heads[0] * asked.group).bfloat16() if asked.sinks else None
    return Made(
        asked,
        query,
        fused[:, 0],
        fused[:, 1],
        *caches,
        table,
        sinks,
        keys,
        values,
        num_tokens,
        ends,
    )


def _caches(asked: Asked, blocks: int, dtype: Any) -> tuple[Any, Any]:
    size, heads, width = asked.block_size, asked.num_kv_heads, asked.head_size
    nan = float("nan")
    if asked.layout == "blocks first":
        both = torch.full((blocks, 2, size, heads, width), nan, dtype=dtype)
        return both[:, 0], both[:, 1]
    if asked.layout == "heads first":
        both = torch.full((2, blocks, heads, size, width), nan, dtype=dtype).transpose(2, 3)
    else:
        both = torch.full((2, blocks, size, heads, width), nan, dtype=dtype)
    return both[0], both[1]


def draw(chosen: random.Random) -> Asked:
    """Any batch at all, a few of which nobody has to answer."""
    states = ("prefill", "cache_hit", "chunked", "decode", "speculative")
    state = chosen.choices(states, (4, 2, 2, 2, 2))[0]
    attn_type = chosen.choices(("decoder", "encoder_only", "encoder_decoder"), (16, 2, 2))[0]
    count = chosen.choices(range(7), (1, 4, 6, 6, 4, 3, 2))[0]
    longest = {"decode": 1, "speculative": chosen.choice((2, 4, 16, 20))}.get(
        state, chosen.choice((1, 2, 9, 40))
    )
    queries = [
        1 if state == "decode" else chosen.choice((0, 1, chosen.randint(1, longest)))
        for _ in range(count)
    ]
    lengths = (0, 1, chosen.randint(1, 16), chosen.randint(16, 90), 64)
    contexts = [chosen.choice(lengths) for _ in range(count)]
    encoder = attn_type in ("encoder_only", "encoder")
    if encoder or (state == "prefill" and attn_type == "decoder"):
        contexts = [0] * count
    group = chosen.choice((1, 1, 4, 8))
    sinks = attn_type == "decoder" and chosen.random() < 0.08
    sizes = (50, 45, 2, 1, 1, 1) if sinks else (20, 30, 20, 28, 1, 1)
    # Positions of cross attention's queries and keys have nothing to do with each other.
    windows = (None, None, 1, 2, chosen.randint(1, 40), 64, 200)
    return Asked(
        state,
        tuple(queries),
        tuple(contexts),
        causal=sinks or chosen.random() < 0.6,
        head_size=chosen.choices((64, 128, 192, 256, 32, 80), sizes)[0],
        num_kv_heads=chosen.choice((1, 2, 3)) if group < 8 else 1,
        group=group,
        window=None if attn_type == "encoder_decoder" else chosen.choice(windows),
        sinks=sinks,
        attn_type=attn_type,
        dtype=chosen.choices(("float32", "bfloat16", "float16"), (5, 4, 1))[0],
        kv_dtype="auto" if chosen.random() < 0.99 else "int8",
        block_size=chosen.choice((16, 16, 32, 128, 24)),
        layout=chosen.choices(LAYOUTS, (4, 2, 1))[0],
        shared=tuple(i for i in range(1, count) if chosen.random() < 0.4),
        dummies=chosen.choice((0, 0, 0, 1, 3)),
        spare=chosen.choice((0, 0, 2)),
        capturing=chosen.random() < 0.01,
        soc="emulated" if chosen.random() < 0.99 else "310P",
        seed=chosen.randrange(2**31),
    )
