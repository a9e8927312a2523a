"""Steps that scripts/bench attention times: a batch, its route, tensors, and the dense answer."""

from __future__ import annotations

from typing import Any

# name: fields of a case; small heads, so that copies are not what is measured.
KINDS: dict[str, dict[str, Any]] = {
    "decode": {"state": "decode"},
    "decode, window": {"state": "decode", "sliding_window": 64},
    "decode, window, head size 256": {
        "state": "decode",
        "sliding_window": 64,
        "head_size": 256,
        "num_kv_heads": 1,
        "num_heads": 2,
    },
    "decode, blocks first": {"state": "decode"},
    "chunked": {"state": "chunked", "max_query_len": 4},
    "prefill": {"state": "prefill", "max_query_len": 4},
    "prefill, not causal": {"state": "prefill", "max_query_len": 4, "causal": False},
}


class Step:
    """One step of a kind: a batch, its route, tensors, and a fresh batch for a first layer."""

    def __init__(self, kind: str, requests: int, dtype: Any) -> None:
        import torch

        from ascend_patch.kernels.attention.case import Case
        from ascend_patch.kernels.attention.route import route

        fields = {"head_size": 64, "num_heads": 4, "num_kv_heads": 2, "batch": requests}
        queries = KINDS[kind].get("max_query_len", 1)
        context = 0 if KINDS[kind]["state"] == "prefill" else 100
        self.length, self.queries = context + queries, queries
        self.case = Case(**{**fields, **KINDS[kind], "max_seq_len": self.length})
        self.route = route(self.case)
        heads, width = self.case.num_kv_heads, self.case.head_size
        blocks = 1 + requests * -(-self.length // 128)
        shape = (blocks, 2, 128) if kind.endswith("blocks first") else (2, blocks, 128)
        both = torch.randn(*shape, heads, width).to(dtype)
        first = kind.endswith("blocks first")
        self.key_cache, self.value_cache = both.unbind(1) if first else both.unbind(0)
        self.table = torch.arange(1, blocks, dtype=torch.int32).view(requests, -1)
        tokens = requests * queries
        self.query = torch.randn(tokens, self.case.num_heads, width).to(dtype)
        self.key, self.value = (torch.randn(tokens, heads, width).to(dtype) for _ in range(2))
        self.out = torch.empty_like(self.query)
        self.requests = requests

    def batch(self) -> Any:
        from ascend_patch.kernels.attention.attend import Batch

        ends = [self.queries * (request + 1) for request in range(self.requests)]
        return Batch(ends, [self.length] * self.requests, self.table, self.query.shape[0])

    def attend(self, batch: Any) -> None:
        from ascend_patch.kernels.attention.attend import attend

        attend(
            self.route,
            batch,
            self.query,
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.out,
            num_heads=self.case.num_heads,
            num_kv_heads=self.case.num_kv_heads,
            head_size=self.case.head_size,
            scale=self.case.head_size**-0.5,
        )

    def dense(self) -> Any:
        """[T, Hq, D] fp64, a request at a time, from the tensors that `attend` is given."""
        import torch

        found = []
        for request in range(self.requests):
            own = slice(request * self.queries, (request + 1) * self.queries)
            key, value = self.key[own], self.value[own]
            if self.case.state != "prefill":
                row = self.table[request].long()
                key, value = (
                    cache[row].flatten(0, 1)[: self.length]
                    for cache in (self.key_cache, self.value_cache)
                )
            group = self.case.num_heads // self.case.num_kv_heads
            key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
            scores = torch.einsum("ihd,jhd->hij", self.query[own].double(), key)
            places = torch.arange(self.length)
            distance = (self.length - self.queries + torch.arange(self.queries))[:, None] - places
            hidden = (distance < 0) if self.case.causal else torch.zeros_like(distance).bool()
            if self.case.sliding_window:
                hidden |= distance >= self.case.sliding_window
            scores = (scores * self.case.head_size**-0.5).masked_fill(hidden, float("-inf"))
            found.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value))
        return torch.cat(found)
