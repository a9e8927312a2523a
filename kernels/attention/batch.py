"""The requests of one step, as the operators want their lengths."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Requests of a batch that one call takes: which, their rows, their ends, their lengths."""

    requests: slice
    tokens: slice
    ends: list[int]
    kv_lens: list[int]


@dataclass
class Batch:
    """One step's requests, shared by the layers that share a block table.

    Attributes:
        query_ends: Where each request's queries end, cumulative. Entries past ``seq_lens`` or
            ``num_tokens`` are padding.
        seq_lens: Tokens of each request, its context and its queries; for cross attention the
            encoder's.
        block_table: [requests or more, blocks] int32 on the device, or None without a cache.
        num_tokens: Rows of the output that are to be written; those past the last query get zeros.
        derived: What layers compute once a step from the above.

    Raises:
        ValueError: ``num_tokens`` cuts a request.
    """

    query_ends: list[int]
    seq_lens: list[int]
    block_table: Tensor | None
    num_tokens: int
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = min(len(self.seq_lens), bisect_right(self.query_ends, self.num_tokens))
        self.ends: list[int] = self.query_ends[:count]
        self.kv_lens: list[int] = self.seq_lens[:count]
        self.end = self.ends[-1] if count else 0
        if count < min(len(self.seq_lens), len(self.query_ends)) and self.end < self.num_tokens:
            raise ValueError(
                f"num_tokens is {self.num_tokens}, but request {count} has the queries from "
                f"{self.end} to {self.query_ends[count]}; num_tokens must not cut a request."
            )

    @property
    def whole(self) -> Part:
        """All requests."""
        return Part(slice(0, len(self.ends)), slice(0, self.end), self.ends, self.kv_lens)

    def parts(self, blocks: int, size: int) -> list[Part]:
        """Requests, cut so that each part holds no more blocks of ``size`` than ``blocks``.

        An operator counts a block for every request that holds it, and refuses more than the cache
        has; requests that share a long prefix can come to that.
        """
        found: list[Part] | None = self.derived.get(("parts", blocks, size))
        if found is None:
            found = self.derived["parts", blocks, size] = [
                self._part(cut) for cut in cuts(self.kv_lens, blocks, size)
            ]
        return found

    def _part(self, cut: slice) -> Part:
        if cut.stop - cut.start == len(self.ends):
            return self.whole
        first = self.ends[cut.start - 1] if cut.start else 0
        ends = [end - first for end in self.ends[cut]]
        return Part(cut, slice(first, first + ends[-1]), ends, self.kv_lens[cut])

    @property
    def starts(self) -> list[int]:
        """Where each request's queries begin."""
        return [0, *self.ends[:-1]]

    @property
    def rows(self) -> Tensor:
        """The block table's rows of the requests: [requests, blocks] int32, contiguous.

        Raises ValueError where there is no block table, or one of too few rows.
        """
        found = self.derived.get("rows")
        if found is None:
            table = self.block_table
            if table is None or table.shape[0] < len(self.ends):
                shape = None if table is None else list(table.shape)
                raise ValueError(
                    f"block_table is {shape}, but {len(self.ends)} requests read the cache; it "
                    "must have a row for each."
                )
            found = self.derived["rows"] = table[: len(self.ends)].int().contiguous()
        return found


def cuts(lens: list[int], blocks: int, size: int) -> list[slice]:
    """Slices of ``lens``, tokens of each request, that hold ``blocks`` blocks or fewer each."""
    counts = [-(-length // size) for length in lens]
    found, start, held = [], 0, 0
    if sum(counts) > blocks:
        for request, count in enumerate(counts):
            if held + count > blocks and request > start:
                found.append(slice(start, request))
                start, held = request, 0
            held += count
    return [*found, slice(start, len(lens))]
