"""One call of a route on random inputs, and a dense answer to it in float64 on the CPU.

Among thousands of keys one more or one fewer is less than a rounding, so some keys are made to
weigh about as much as all others together: the first that a query must not see any more, the last
that it must, and one in the middle of the queries' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels.attention import table
from ascend_patch.kernels.attention.attend import Batch, attend
from ascend_patch.kernels.attention.case import Case, Route
from ascend_patch.kernels.selftest import Verdict, fault

BLOCK = 128
# Queries of the requests of one step, by state; of a prompt about half on each side of a needle.
QUERIES = {"prefill": (33, 8), "decode": (1, 1), "chunked": (1, 33, 8)}
CONTEXT = 70
# What an operator may be off by, as a share of the weighted sum of |value|: its weights are
# rounded, those of float16 perhaps in a faster mode. A needle is a third of that sum.
ALLOWED = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-6, torch.float32: 2.0**-14}
# In the cache where no request has a token: far from every value, and finite, as memory of vLLM is.
FILLER = 50.0


@dataclass
class _Request:
    """query [Q, Hq, D]; key, value [S, Hkv, D], all of them; on the CPU."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Trial:
    """A route for a case, on inputs that the seed decides."""

    route: Route
    case: Case
    dtype: torch.dtype
    device: torch.device
    seed: int

    def judged(self) -> Verdict:
        """Call the operator: how far is it from the dense answer?"""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        requests = [self._request(i, generator) for i in range(len(QUERIES[self.case.state]))]
        sinks = None
        if self.case.sinks:
            sinks = torch.randn(self.case.num_heads, generator=generator).to(torch.bfloat16)
        got = self._called(requests, sinks)
        verdict, start = Verdict(), 0
        for request in requests:
            end = start + len(request.query)
            verdict = verdict.and_also(self._compared(got[start:end], request, sinks))
            start = end
        return verdict

    def _lengths(self, index: int) -> tuple[int, int]:
        """Context and queries of a request: windows end within them."""
        queries = QUERIES[self.case.state][index]
        if self.case.state != "prefill":
            return CONTEXT + (self.case.sliding_window or 0) + index, queries
        return 0, queries + (self.case.sliding_window or 0)

    def _request(self, index: int, generator: torch.Generator) -> _Request:
        case = self.case
        context, queries = self._lengths(index)
        length = context + queries
        # Encoders' keys are the queries' own.
        shape = (case.num_kv_heads, case.head_size)
        towards = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        group = case.num_heads // case.num_kv_heads
        query = torch.randn(queries, case.num_heads, case.head_size, generator=generator) * 0.1
        query += towards.repeat_interleave(group, 0)
        key, value = (torch.randn(length, *shape, generator=generator) for _ in "kv")
        strength = math.log(length) / math.sqrt(case.head_size)
        for position in self._needles(index, context, queries):
            key[position] = towards * strength
        return _Request(*(x.to(self.dtype) for x in (query, key, value)))

    def _needles(self, index: int, context: int, queries: int) -> list[int]:
        own = context + queries // 2
        found = [own]
        if self.case.sliding_window is not None:
            # Of a single query, one request has the last key in sight and another the first beyond.
            inside = 1 if queries == 1 and index % 2 else 0
            found.append(own - self.case.sliding_window + inside)
            found.append(own + self.case.sliding_window)
        return [p for p in found if 0 <= p < context + queries]

    def _called(self, requests: list[_Request], sinks: Tensor | None) -> Tensor:
        case, device = self.case, self.device
        lens = [len(r.key) for r in requests]
        ends = torch.tensor([len(r.query) for r in requests]).cumsum(0).tolist()
        query, key, value = (
            torch.cat([getattr(r, name)[-len(r.query) :] for r in requests]).to(device)
            for name in ("query", "key", "value")
        )
        blocks = [-(-n // BLOCK) for n in lens]
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)
        order = torch.randperm(sum(blocks) + 1, generator=generator).int()
        cache = torch.full((2, len(order), BLOCK, *requests[0].key.shape[1:]), FILLER)
        rows = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
        for row, own, r in zip(rows, order[:-1].split(blocks), requests, strict=True):
            row[: len(own)] = own
            slots = (own.long()[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[: len(r.key)]
            cache.flatten(1, 2)[0, slots] = r.key.float()
            cache.flatten(1, 2)[1, slots] = r.value.float()
        on_device = cache.to(device, self.dtype)
        out = torch.full_like(query, math.nan)
        attend(
            self.route,
            Batch(ends, lens, rows.to(device), ends[-1]),
            query,
            key,
            value,
            on_device[0],
            on_device[1],
            out,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            scale=case.head_size**-0.5,
            sinks=None if sinks is None else sinks.to(device),
        )
        return out.cpu().double()

    def _compared(self, got: Tensor, request: _Request, sinks: Tensor | None) -> Verdict:
        expected, weight = self._dense(request, sinks)
        if not got.isfinite().all():
            return fault(f"{int((~got.isfinite()).sum())} elements are no finite number")
        weight = weight.clamp_min(1e-6)
        shares = (got - expected).abs() / weight
        share = float(shares.max()) / ALLOWED[self.dtype]
        # 999 of 1000 elements, in the unit that the status has.
        order = shares.flatten().sort().values
        ulps = float(order[-1 - len(order) // 1000]) / torch.finfo(self.dtype).eps
        if share <= 1:
            return Verdict(ulps, share)
        at = tuple(int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
        return Verdict(
            ulps,
            share,
            f"query {at[0]} of {len(got)}, head {at[1]}: {float(got[at]):.4g} instead of "
            f"{float(expected[at]):.4g}",
        )

    def _dense(self, request: _Request, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The answer [Q, Hq, D] in float64, and the weighted sum of |value| behind each element."""
        query, key, value = (x.double() for x in (request.query, request.key, request.value))
        distance = torch.arange(len(query))[:, None] + len(key) - len(query)
        distance = distance - torch.arange(len(key))
        hidden = distance < 0 if table.is_causal(self.case) else torch.zeros_like(distance).bool()
        if self.case.sliding_window is not None:
            hidden = hidden | (distance.abs() >= self.case.sliding_window)
        group = self.case.num_heads // self.case.num_kv_heads
        results, weights = [], []
        for head in range(self.case.num_heads):
            own = head // group
            scores = query[:, head] @ key[:, own].T * self.case.head_size**-0.5
            scores = scores.masked_fill(hidden, -math.inf)
            if sinks is not None:
                beside = sinks[head].double().expand(len(scores), 1)
                scores = torch.cat((scores, beside), 1)
            share = scores.softmax(1)[:, : len(key)]
            results.append(share @ value[:, own])
            weights.append(share @ value[:, own].abs())
        return torch.stack(results, 1), torch.stack(weights, 1)
