"""Small calls of every public kernel function, ways to make them wrong, and what each must give.

The expected results are formulas in fp64 over the arguments themselves, token by token, written
apart from the kernels and from their references.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import gdn, kv_layout, rope

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


@dataclass
class Made:
    """A call.

    Attributes:
        arguments: By name.
        written: Arguments that the function writes to.
        wanted: What it must give: results, and each written argument, from copies of what was
            given. None where a result cannot be told, so that such a call must be refused.
    """

    arguments: Arguments
    written: tuple[str, ...]
    wanted: Callable[[Arguments], Mapping[str, Any] | None]
    # How results differ from fp64 by rounding: relative, per dtype.
    slack: float = 1.0
    note: str = ""
    notes: list[str] = field(default_factory=list)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# --- rotary -------------------------------------------------------------------------------------


def _angles(a: Arguments) -> tuple[Tensor, Tensor]:
    """cos and sin, fp64 [T, half]; positions outside the cache take its nearest row."""
    cache, positions = a["cos_sin_cache"].double(), a["positions"].long()
    half = cache.shape[1] // 2
    positions = positions.clamp(0, len(cache) - 1)
    section = a.get("mrope_section")
    if section is None or positions.dim() == 1:
        rows = cache[positions.reshape(-1)]
        return rows[:, :half], rows[:, half:]
    axes = [axis for axis, size in enumerate(section) for _ in range(size)]
    if a.get("mrope_interleaved"):
        axes = [0] * half
        for axis in (1, 2):
            for n in range(section[axis]):
                if axis + 3 * n < half:
                    axes[axis + 3 * n] = axis
    columns = [cache[positions[axis]][:, [j, j + half]] for j, axis in enumerate(axes)]
    both = torch.stack(columns, 1)
    return both[..., 0], both[..., 1]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, size: int, neox: bool) -> Tensor:
    """x [.., heads * size] or [.., heads, size] of as many rows as cos and sin have."""
    rows, half = cos.shape
    heads = x.double().reshape(rows, -1, size) if rows else x.double().reshape(0, 1, size)
    out = heads.clone()
    for j in range(half):
        first, second = (j, j + half) if neox else (2 * j, 2 * j + 1)
        a, b = heads[..., first], heads[..., second]
        c, s = cos[:, None, j], sin[:, None, j]
        out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return out.reshape(x.shape)


def _rotary(in_place: bool) -> Callable[[], Made]:
    def make() -> Made:
        tokens, size = random.randint(0, 5), random.choice((4, 6, 8))
        half = random.randint(1, size // 2)
        dtype = random.choice(FLOATS)
        qkv = normal(tokens, 5 * size, dtype=dtype)
        query, key = qkv[:, : 2 * size], qkv[:, 2 * size : 3 * size]
        if random.random() < 0.5:
            query, key = query.clone(), key.clone()
        a: Arguments = {
            "positions": torch.randint(0, 7, (tokens,)),
            "query": query,
            "key": key if random.random() < 0.8 else None,
            "cos_sin_cache": normal(7, 2 * half),
            "head_size": size,
            "is_neox_style": random.random() < 0.5,
        }
        if random.random() < 0.3:
            split = random.randint(0, half)
            a["mrope_section"] = [split, half - split, 0]
            a["positions"] = torch.randint(0, 7, (3, tokens))

        def wanted(b: Arguments) -> Mapping[str, Any]:
            cos, sin = _angles(b)
            turned = {
                name: None if b[name] is None
                else _rotated(b[name], cos, sin, b["head_size"], b["is_neox_style"])
                for name in ("query", "key")
            }  # fmt: skip
            if in_place:
                return {"result": None, **turned}
            return {"result": (turned["query"], turned["key"])}

        return Made(a, ("query", "key") if in_place else (), wanted)

    return make


def _apply_rotary() -> Made:
    places, heads, size = random.randint(0, 4), random.randint(1, 3), random.choice((4, 8))
    half = random.randint(1, size // 2)
    batch = random.choice((0, 1, 2))
    lead = (batch, places) if batch else (places,)
    angles = lead if batch and random.random() < 0.5 else (places,)
    a: Arguments = {
        "x": normal(*lead, heads, size, dtype=random.choice(FLOATS)),
        "cos": normal(*angles, half),
        "sin": normal(*angles, half),
        "is_neox_style": random.random() < 0.5,
    }

    def wanted(b: Arguments) -> Mapping[str, Any]:
        x = b["x"]
        rows, width = x.shape[:-2].numel(), b["cos"].shape[-1]
        cos, sin = (
            b[name].double().expand(*x.shape[:-2], width).reshape(rows, width)
            for name in ("cos", "sin")
        )
        return {"result": _rotated(x, cos, sin, x.shape[-1], b["is_neox_style"])}

    return Made(a, (), wanted)


def _fused() -> Made:
    tokens, size, queries, keys = random.randint(0, 4), random.choice((4, 8)), 2, 1
    half = random.randint(1, size // 2)
    gate = random.random() < 0.4
    width = (queries * (2 if gate else 1) + 2 * keys) * size
    a: Arguments = {
        "qkv": normal(tokens, width, dtype=random.choice(FLOATS)),
        "positions": torch.randint(0, 7, (tokens,)),
        "cos_sin_cache": normal(7, 2 * half),
        "q_weight": normal(size),
        "k_weight": normal(size),
        "num_q_heads": queries,
        "num_kv_heads": keys,
        "head_size": size,
        "eps": 1e-3,
        "has_gate": gate,
    }
    if random.random() < 0.4:
        a |= {"q_bias": normal(size), "k_bias": normal(size)}

    def wanted(b: Arguments) -> Mapping[str, Any]:
        n, q, k = b["head_size"], b["num_q_heads"], b["num_kv_heads"]
        rows = b["qkv"].shape[0]
        heads = b["qkv"].double().reshape(rows, b["qkv"].shape[1] // n, n)
        step = 2 if b["has_gate"] else 1
        parts = [heads[:, : step * q : step], heads[:, step * q :][:, :k]]
        cos, sin = _angles(b)
        found = []
        for x, name in zip(parts, ("q", "k"), strict=True):
            x = x / (x.square().mean(-1, keepdim=True) + float(b["eps"])).sqrt()
            x = x * b[f"{name}_weight"].double()
            bias = b.get(f"{name}_bias")
            x = x if bias is None else x + bias.double()
            flat = x.reshape(rows, x.shape[1] * n)
            found.append(_rotated(flat, cos, sin, n, b.get("is_neox_style", True)))
        found.append(heads[:, step * q + k :][:, :k].reshape(rows, k * n))
        if step == 2:
            found.append(heads[:, 1 : 2 * q : 2].reshape(rows, q * n))
        return {"result": tuple(found)}

    return Made(a, (), wanted, slack=8.0)


# --- gated delta rule ---------------------------------------------------------------------------


def _starts(b: Arguments, name: str, tokens: int) -> list[int]:
    metadata = b.get("chunk_metadata")
    if metadata is not None:
        return list(metadata.starts)
    return [0, tokens] if b.get(name) is None else b[name].tolist()


def _conv(update: bool) -> Callable[[], Made]:
    def make() -> Made:
        channels, width = random.randint(1, 5), random.randint(2, 5)
        dtype = random.choice(FLOATS)
        lengths = [1] * random.randint(0, 4) if update else [
            random.randint(0, 4) for _ in range(random.randint(1, 4))
        ]  # fmt: skip
        tokens, count = sum(lengths), len(lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        slots = torch.randperm(count + 3)[:count].to(torch.int32)
        if count and random.random() < 0.3:
            slots[0] = -1
        a: Arguments = {
            "x": normal(tokens, channels, dtype=dtype),
            "weight": normal(channels, width, dtype=dtype),
            "bias": normal(channels) if random.random() < 0.5 else None,
            "activation": random.choice((None, "silu", True)),
            "conv_state": normal(count + 3, width - 1 + random.randint(0, 2), channels).transpose(
                1, 2
            ),
            "state_indices": slots,
        }
        if not update:
            a["has_initial_state"] = torch.rand(count) < 0.6
            if random.random() < 0.5:
                a["query_start_loc"] = starts
            else:
                a["chunk_metadata"] = gdn.build_chunk_metadata(starts, torch.device("cpu"))
        elif random.random() < 0.5:
            a["query_start_loc"] = starts
        if random.random() < 0.4:
            a["out"] = torch.full((tokens, channels), 7.0, dtype=dtype)
        return Made(a, ("conv_state", "out"), lambda b: _convolved(b, update))

    return make


def _convolved(b: Arguments, update: bool) -> Mapping[str, Any]:
    x, weight, state = b["x"].double(), b["weight"].double(), b["conv_state"]
    before, slots = weight.shape[1] - 1, b.get("state_indices")
    starts = _starts(b, "query_start_loc", len(x))
    if update and b.get("query_start_loc") is None:
        starts = list(range(len(x) + 1))
    count = len(starts) - 1
    if update and b.get("query_start_loc") is not None:
        count = len(slots)
    out = torch.zeros(x.shape, dtype=torch.float64) if b.get("out") is None else b["out"].double()
    kept = None if state is None else state.clone()
    carried = b.get("has_initial_state")
    for n in range(count):
        slot = n if slots is None else int(slots[n])
        if slot < 0:
            continue
        past = torch.zeros(before, x.shape[1], dtype=torch.float64)
        if state is not None and (carried is None or bool(carried[n])):
            past = state[slot, :, :before].double().t()
        rows = torch.cat((past, x[starts[n] : starts[n + 1]]))
        for t in range(starts[n], starts[n + 1]):
            at = t - starts[n]
            total = (rows[at : at + before + 1].t() * weight).sum(1)
            total = total if b.get("bias") is None else total + b["bias"].double()
            out[t] = torch.nn.functional.silu(total) if b.get("activation") else total
        if kept is not None and starts[n + 1] > starts[n]:
            kept[slot, :, :before] = rows[len(rows) - before :].t().to(kept.dtype)
    return {"result": out, "conv_state": kept, "out": None if b.get("out") is None else out}


def _delta_inputs(tokens: int, dtype: torch.dtype) -> Arguments:
    heads, group, size, values = (
        random.randint(1, 2),
        random.randint(1, 2),
        4,
        random.choice((4, 6)),
    )
    return {
        "q": normal(1, tokens, heads, size, dtype=dtype),
        "k": normal(1, tokens, heads, size, dtype=dtype) * 0.5,
        "v": normal(1, tokens, heads * group, values, dtype=dtype),
        "state_layout": random.choice(("VK", "KV")),
    }


def _cache(a: Arguments, slots: int) -> Tensor:
    heads, values, size = a["v"].shape[2], a["v"].shape[3], a["k"].shape[3]
    return normal(slots, heads, *((values, size) if a["state_layout"] == "VK" else (size, values)))


def _chunk() -> Made:
    lengths = [random.randint(0, 4) for _ in range(random.randint(1, 3))]
    tokens, count = sum(lengths), len(lengths)
    a = _delta_inputs(tokens, random.choice(FLOATS))
    heads = a["v"].shape[2]
    a |= {"g": -torch.rand(1, tokens, heads), "beta": torch.rand(1, tokens, heads)}
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if random.random() < 0.5:
        a["cu_seqlens"] = starts
    else:
        a["chunk_metadata"] = gdn.build_chunk_metadata(starts, torch.device("cpu"))
    kind = random.choice(("none", "initial", "cache"))
    if kind == "initial":
        a["initial_state"] = _cache(a, count)
    elif kind == "cache":
        a |= {"state": _cache(a, count + 2), "state_indices": torch.randperm(count + 2)[:count]}
        if random.random() < 0.6:
            a["has_initial_state"] = torch.rand(count) < 0.6
    if random.random() < 0.4:
        a["out"] = torch.full_like(a["v"], 7.0)
    return Made(a, ("state", "out"), _chunked, slack=64.0)


def _chunked(b: Arguments) -> Mapping[str, Any]:
    tokens = b["q"].shape[1]
    starts, slots = _starts(b, "cu_seqlens", tokens), b.get("state_indices")
    given = b.get("state") if b.get("initial_state") is None else b["initial_state"]
    kept = None if b.get("state") is None else b["state"].clone()
    out = torch.zeros(b["v"].shape[1:], dtype=torch.float64)
    if b.get("out") is not None:
        out = b["out"][0].double().clone()
    finals, rows = [], _delta_rows(b)
    for n in range(len(starts) - 1):
        slot = n if slots is None else int(slots[n])
        state = torch.zeros(rows.shape, dtype=torch.float64)
        carried = b.get("has_initial_state")
        if given is not None and slot >= 0 and (carried is None or bool(carried[n])):
            state = rows.as_kv(given[slot])
        for t in range(starts[n], starts[n + 1]):
            state, out[t] = rows.step(state, t)
        finals.append(rows.as_given(state))
        if kept is not None and slot >= 0:
            kept[slot] = rows.as_given(state).to(kept.dtype)
    empty = torch.zeros(0, *rows.as_given(torch.zeros(rows.shape)).shape)
    final = torch.stack(finals) if finals else empty
    if kept is not None or b.get("output_final_state") is False:
        final = None
    # Rows behind the last sequence are nobody's, where ``out`` was made by the function.
    mine = slice(0, starts[-1])
    result = {"result": (out[None, mine], final), "state": kept, "rows": mine}
    if b.get("out") is not None:
        result["out"] = out[None]
    return result


@dataclass
class _Rows:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    layout: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]

    def as_kv(self, state: Tensor) -> Tensor:
        return (state if self.layout == "KV" else state.transpose(-1, -2)).double()

    def as_given(self, state: Tensor) -> Tensor:
        return state if self.layout == "KV" else state.transpose(-1, -2)

    def step(self, state: Tensor, t: int) -> tuple[Tensor, Tensor]:
        state = state * self.g[t].exp()[:, None, None]
        change = self.beta[t][:, None] * (self.v[t] - (state * self.k[t][:, :, None]).sum(1))
        state = state + self.k[t][:, :, None] * change[:, None, :]
        return state, self.scale * (state * self.q[t][:, :, None]).sum(1)


def _delta_rows(b: Arguments) -> _Rows:
    q, k, v = (b[name][0].double() for name in "qkv")
    if b.get("use_qk_l2norm_in_kernel"):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    group = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    if b.get("A_log") is not None:
        x = b["a"].double() + b["dt_bias"].double()
        g = -b["A_log"].double().exp() * torch.nn.functional.softplus(x)
        beta = b["b"].double().sigmoid()
    else:
        g, beta = b["g"][0].double(), b["beta"][0].double()
    scale = k.shape[2] ** -0.5 if b.get("scale") is None else b["scale"]
    return _Rows(q, k, v, g, beta, scale, b["state_layout"])


def _recurrent() -> Made:
    requests = random.randint(0, 3)
    lengths = [1] * requests if random.random() < 0.5 else [
        random.randint(0, 3) for _ in range(requests)
    ]  # fmt: skip
    tokens = sum(lengths)
    a = _delta_inputs(tokens, random.choice(FLOATS))
    heads, width = a["v"].shape[2], random.choice((0, 0, 3))
    slots = torch.randperm(requests * max(width, 1) + 3)[: requests * max(width, 1)]
    a["state"] = _cache(a, requests * max(width, 1) + 3)
    a["state_indices"] = slots.view(requests, width) if width else slots
    if random.random() < 0.5:
        a |= {"g": -torch.rand(1, tokens, heads), "beta": torch.rand(1, tokens, heads)}
    else:
        a |= {name: normal(tokens, heads) for name in "ab"}
        a |= {"A_log": normal(heads), "dt_bias": normal(heads)}
    if lengths != [1] * requests or random.random() < 0.5:
        a["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if width and random.random() < 0.6:
        a["num_accepted_tokens"] = torch.randint(1, width + 1, (requests,))
    if random.random() < 0.4:
        a["out"] = torch.full_like(a["v"], 7.0)
    return Made(a, ("state", "out"), _recurred, slack=64.0)


def _recurred(b: Arguments) -> Mapping[str, Any]:
    tokens = b["q"].shape[1]
    starts = list(range(tokens + 1)) if b.get("cu_seqlens") is None else b["cu_seqlens"].tolist()
    columns, kept = b["state_indices"], b["state"].clone()
    two = columns.dim() == 2
    columns = columns if two else columns[:, None]
    out = torch.zeros(b["v"].shape[1:], dtype=torch.float64)
    if b.get("out") is not None:
        out = b["out"][0].double().clone()
    rows, before = _delta_rows(b), b["state"]
    mine = [t for n in range(len(starts) - 1) for t in range(starts[n], starts[n + 1])]
    for n in range(len(starts) - 1):
        first = 0
        if b.get("num_accepted_tokens") is not None:
            first = min(max(int(b["num_accepted_tokens"][n]) - 1, 0), columns.shape[1] - 1)
        slot = int(columns[n, first])
        if slot < 0:
            out[starts[n] : starts[n + 1]] = 0
            continue
        state = rows.as_kv(before[slot])
        for place, t in enumerate(range(starts[n], starts[n + 1])):
            state, out[t] = rows.step(state, t)
            to = int(columns[n, place]) if two and place < columns.shape[1] else -1
            to = slot if not two else to
            if to >= 0:
                kept[to] = rows.as_given(state).to(kept.dtype)
    return {
        "result": out[None, mine],
        "state": kept,
        "out": None if b.get("out") is None else out[None],
        "rows": mine,
    }


def _gating() -> Made:
    tokens, heads = random.randint(0, 5), random.randint(1, 4)
    a: Arguments = {name: normal(tokens, heads, dtype=random.choice(FLOATS)) for name in "ab"}
    a |= {"A_log": normal(heads), "dt_bias": normal(heads)}
    if random.random() < 0.3:
        a |= {"softplus_beta": random.choice((0.5, 2)), "softplus_threshold": 3.0}

    def wanted(b: Arguments) -> Mapping[str, Any]:
        beta = float(b.get("softplus_beta", 1.0))
        threshold = float(b.get("softplus_threshold", 20.0))
        x = b["a"].double() + b["dt_bias"].double()
        scaled = beta * x
        soft = torch.where(scaled > threshold, x, scaled.clamp(max=600).exp().log1p() / beta)
        return {
            "result": ((-b["A_log"].double().exp() * soft)[None], b["b"].double().sigmoid()[None])
        }

    return Made(a, (), wanted, slack=16.0)


def _norm() -> Made:
    size = random.choice((4, 6, 8))
    shape = (*random.choice(((0,), (3,), (2, 2))), size)
    dtype = random.choice(FLOATS)
    a: Arguments = {
        "x": normal(*shape, dtype=dtype),
        "gate": normal(*shape, dtype=dtype) if random.random() < 0.7 else None,
        "weight": normal(size),
        "eps": 1e-3,
        "group_size": random.choice((None, 2, size)),
        "norm_before_gate": random.random() < 0.5,
    }
    if random.random() < 0.4:
        a["out"] = torch.full_like(a["x"], 7.0)
    elif random.random() < 0.2:
        a["out"] = a["x"]

    def wanted(b: Arguments) -> Mapping[str, Any]:
        x, weight = b["x"].double(), b["weight"].double()
        gate = None if b["gate"] is None else torch.nn.functional.silu(b["gate"].double())
        if gate is not None and not b["norm_before_gate"]:
            x = x * gate
        group = b["group_size"] or x.shape[-1]
        parts = x.unflatten(-1, (-1, group))
        parts = parts / (parts.square().mean(-1, keepdim=True) + float(b["eps"])).sqrt()
        out = parts.flatten(-2) * weight
        if gate is not None and b["norm_before_gate"]:
            out = out * gate
        return {"result": out, "out": None if b.get("out") is None else out}

    return Made(a, ("out",), wanted, slack=8.0)


# --- caches -------------------------------------------------------------------------------------


def _merge() -> Made:
    blocks, tokens, width = random.randint(1, 4), random.randint(1, 3), random.randint(1, 3)
    shards = random.choice(([1, 1], [2, 1], [1, 2, 1], [3], 2))
    heads = 4 if shards == 2 else sum(shards)
    dtype = random.choice((torch.float32, torch.bfloat16, torch.int8))
    caches = [
        torch.randint(-100, 100, (blocks, tokens, heads, width)).to(dtype)
        for _ in range(random.randint(1, 2))
    ]
    ids = random.sample(range(blocks), random.randint(0, blocks))
    a: Arguments = {
        "caches": caches,
        "block_ids": torch.tensor(ids, dtype=torch.int64) if random.random() < 0.4 else ids,
        "shards": shards,
    }

    def wanted(b: Arguments) -> Mapping[str, Any]:
        counts = b["shards"]
        found = []
        for cache in b["caches"]:
            layout = b.get("layout", "NHD")
            after = cache.clone()
            total = cache.shape[2]
            each = [total // counts] * counts if isinstance(counts, int) else list(counts)
            ids = b["block_ids"]
            for block in ids.tolist() if isinstance(ids, Tensor) else ids:
                if layout == "HND":
                    continue
                flat, at, parts = cache[block].flatten(), 0, []
                for count in each:
                    n = cache.shape[1] * count * cache.shape[3]
                    parts.append(flat[at : at + n].view(cache.shape[1], count, cache.shape[3]))
                    at += n
                after[block] = torch.cat(parts, 1)
            found.append(after)
        return {"result": None, "caches": found}

    return Made(a, ("caches",), wanted, slack=0.0)


def _plan() -> kv_layout.Plan:
    group = kv_layout.LayerGroup(2, 4, (2, 2))
    sides = [
        kv_layout.Side((group,), tp, block_size=random.choice((2, 4)), layout="NHD")
        for tp in (random.choice((1, 2)), random.choice((1, 2, 4)))
    ]
    plan = kv_layout.plan_transfers(kv_layout.Topology(*sides), direction="pull")
    assert isinstance(plan, kv_layout.Plan), plan
    return plan


def descriptors_of_a_request(**a: Any) -> Any:
    """match_blocks and descriptors, one after the other."""
    plan = a["plan"]
    pairs = kv_layout.match_blocks(
        plan.topology, a["prefill_blocks"], a["decode_blocks"], tokens=a["tokens"]
    )
    return kv_layout.descriptors(
        plan,
        a["prefill_rank"],
        a["decode_rank"],
        pairs,
        prefill_bases=a["prefill_bases"],
        decode_bases=a["decode_bases"],
        prefill_num_blocks=64,
        decode_num_blocks=64,
    )


def _descriptors() -> Made:
    plan = _plan()
    prefill, decode = plan.topology.prefill, plan.topology.decode
    tokens = random.randint(1, 16)
    p, d = random.randrange(prefill.world), random.randrange(decode.world)
    a: Arguments = {
        "plan": plan,
        "prefill_blocks": random.sample(range(64), -(-tokens // prefill.block_size)),
        "decode_blocks": random.sample(range(64), -(-tokens // decode.block_size)),
        "tokens": tokens,
        "prefill_rank": p,
        "decode_rank": d,
        "prefill_bases": [10**6 * (n + 1) for n in range(len(prefill.regions(p)))],
        "decode_bases": [10**6 * (n + 1) for n in range(len(decode.regions(d)))],
    }

    def wanted(b: Arguments) -> Mapping[str, Any]:
        """Every range lies in a named block of a region, on both sides; none is written twice."""
        return {"result": "ranges"}

    return Made(a, (), wanted)


def shares_a_slot(a: Arguments) -> bool:
    """Whether two sequences have one state: what each of them finds is not told."""
    slots = a.get("state_indices")
    named = [slot for slot in slots.flatten().tolist() if slot >= 0] if slots is not None else []
    return len(set(named)) < len(named)


def check_ranges(a: Arguments, found: Any) -> None:
    plan = a["plan"]
    if len(set(a["decode_bases"])) < len(a["decode_bases"]):
        return  # two regions in one place, as the caller says
    for side, name in ((plan.topology.prefill, "prefill"), (plan.topology.decode, "decode")):
        sizes = side.regions(a[f"{name}_rank"])
        inside = [
            (base + size * int(block), base + size * (int(block) + 1))
            for base, size in zip(a[f"{name}_bases"], sizes, strict=True)
            for block in a[f"{name}_blocks"]
        ]
        seen = set()
        for address, length in zip(
            getattr(found, name).tolist(), found.lengths.tolist(), strict=True
        ):
            for byte in range(address, address + length):
                assert any(first <= byte < end for first, end in inside), (name, byte)
                assert name == "prefill" or byte not in seen, "a byte is written twice"
                seen.add(byte)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Made]]] = {
    "rotary_embedding": (rope.rotary_embedding, _rotary(False)),
    "rotary_embedding_": (rope.rotary_embedding_, _rotary(True)),
    "apply_rotary": (rope.apply_rotary, _apply_rotary),
    "split_qkv_rmsnorm_rope": (rope.split_qkv_rmsnorm_rope, _fused),
    "causal_conv1d": (gdn.causal_conv1d, _conv(False)),
    "causal_conv1d_update": (gdn.causal_conv1d_update, _conv(True)),
    "chunk_gated_delta_rule": (gdn.chunk_gated_delta_rule, _chunk),
    "recurrent_gated_delta_rule": (gdn.recurrent_gated_delta_rule, _recurrent),
    "fused_gating": (gdn.fused_gating, _gating),
    "gated_rms_norm": (gdn.gated_rms_norm, _norm),
    "merge_head_shards_": (kv_layout.merge_head_shards_, _merge),
    "descriptors": (descriptors_of_a_request, _descriptors),
}


# --- ways to be wrong ---------------------------------------------------------------------------

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64,
    torch.int8, torch.bool, torch.complex64,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 1.5, True, math.nan, "x", None, [1])


def mutate(a: Arguments) -> str:
    """Change one argument in place; says what."""
    name = random.choice([n for n in a if n != "plan"])
    value = a[name]
    if isinstance(value, Tensor):
        what, a[name] = _other_tensor(a, value)
    elif isinstance(value, list) and value and isinstance(value[0], Tensor):
        i = random.randrange(len(value))
        what, changed = "a number", random.choice(NUMBERS)
        if isinstance(value[i], Tensor):
            what, changed = _other_tensor(a, value[i])
        a[name] = [*value[:i], changed, *value[i + 1 :]]
    elif isinstance(value, list):
        what, a[name] = _other_list(value)
    elif value is None or isinstance(value, int | float | str):
        what, a[name] = "a number", random.choice(NUMBERS)
    else:
        what, a[name] = "another kind", random.choice(NUMBERS)
    return f"{name}: {what}"


def _other_list(value: list[int]) -> tuple[str, Any]:
    i = random.randrange(len(value) + 1)
    number = random.choice(NUMBERS)
    return random.choice(
        (
            (f"{number!r} in it", [*value[:i], number, *value[i + 1 :]]),
            ("one more", [*value, 1]),
            ("one less", value[:-1]),
            ("one twice", [*value, *value[-1:]]),
            ("another kind", number),
        )
    )


def _other_tensor(a: Arguments, x: Tensor) -> tuple[str, Any]:
    """What was done to x, and the result."""
    if x.is_meta:
        return "meta", x
    kinds: dict[str, Callable[[], Any]] = {
        "meta": lambda: x.to("meta"),
        "dtype": lambda: x.to(random.choice(DTYPES)),
        "gradient": lambda: x.clone().float().requires_grad_(),
        "one more dimension": lambda: x.clone()[None],
        "shorter": lambda: x[: max(len(x) - 1, 0)].clone() if x.dim() else x,
        "empty": lambda: x[:0].clone() if x.dim() else x,
        "longer": lambda: torch.cat((x, x[:1])) if x.dim() else x,
        "narrower": lambda: x[..., :-1].clone() if x.dim() else x,
        "other strides": lambda: x.t().contiguous().t() if x.dim() == 2 else x.clone(),
        "expanded": lambda: x[:1].expand(x.shape) if x.dim() and len(x) else x,
        "None": lambda: None,
        "a list": lambda: x.tolist(),
        "a number": lambda: random.choice(NUMBERS),
        "memory of another": lambda: _aliased(a, x),
    }
    if any(x is a.get(name) for name in ("g", "state", "conv_state")):
        # A decay above 0 is none: sums grow until roundings are all that is left of them. Caches
        # are held against outputs alone: each look costs every step of a server.
        del kinds["memory of another"]
    if x.dtype in (torch.int32, torch.int64, torch.bool) and x.numel():
        kinds |= {
            f"values {number}": lambda number=number: _with(x, number)
            for number in (-1, -7, 3, 99, 2**31 - 1, -(2**31))
        }
    what = random.choice(list(kinds))
    return what, kinds[what]()


def _with(x: Tensor, number: int) -> Tensor:
    found = x.clone(memory_format=torch.contiguous_format)
    found.view(-1)[random.randrange(x.numel())] = number if x.dtype != torch.bool else bool(number)
    return found


def _aliased(a: Arguments, x: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that shares memory with another one of the call."""
    others = [
        o
        for o in a.values()
        if isinstance(o, Tensor) and o.dtype == x.dtype and o.numel() >= x.numel()
    ]
    caches = [a.get(name) for name in ("state", "conv_state")]
    other = random.choice([*(o for o in others if not any(o is c for c in caches)), x])
    if not other.is_contiguous():
        return x
    room = other.numel() - x.numel()
    flat = other.view(-1)[random.randint(0, room) :][: x.numel()]
    return flat.view(x.shape)
