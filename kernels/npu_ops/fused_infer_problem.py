"""One call of fused inference attention, v1 or v2, with the names that its messages use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError

_MOST = 2147483647
V1, V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"

# Where the parts of a query stand: the letters of its shape.
SHAPES = {
    "BSH": "BSH",
    "BSND": "BSND",
    "BNSD": "BNSD",
    "BNSD_BSND": "BNSD",
    "TND": "TND",
    "NTD_TND": "NTD",
}


@dataclass
class Problem:
    """The arguments of either version under common names.

    ``query_lens`` and ``kv_lens`` are the lists as given; ``key_scale``, ``key_offset``,
    ``value_scale``, ``value_offset`` the separate anti-quantisation; ``others`` what the emulation
    does not know, by the schema's name.
    """

    operator: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    query_lens: Sequence[int] | None
    kv_lens: Sequence[int] | None
    block_table: Tensor | None
    block_size: int
    heads: int
    kv_heads: int
    scale: float
    layout: str
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    inner_precise: int
    with_lse: bool
    sink: Tensor | None = None
    key_scale: Tensor | None = None
    key_offset: Tensor | None = None
    value_scale: Tensor | None = None
    value_offset: Tensor | None = None
    key_mode: int = 0
    value_mode: int = 0
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv_heads = self.kv_heads or self.heads

    @property
    def newer(self) -> bool:
        """Is it the second version?"""
        return self.operator == V2

    @property
    def query_lens_name(self) -> str:
        return "actual_seq_qlen" if self.newer else "actual_seq_lengths"

    @property
    def kv_lens_name(self) -> str:
        return "actual_seq_kvlen" if self.newer else "actual_seq_lengths_kv"

    @property
    def heads_name(self) -> str:
        return "num_query_heads" if self.newer else "num_heads"

    @property
    def letters(self) -> str:
        """The query's dimensions, such as ``BNSD``. Raises OperatorError for a strange layout."""
        if self.layout not in SHAPES:
            raise self.error(
                f"input_layout={self.layout!r} is not emulated; use one of {', '.join(SHAPES)}"
            )
        return SHAPES[self.layout]

    @property
    def ragged(self) -> bool:
        """Is it a layout of concatenated sequences (TND and NTD)?"""
        return "T" in self.letters

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def batch(self) -> int:
        if self.ragged:
            return len(self.query_lens or ())
        return int(self.query.shape[0])

    @property
    def query_rows(self) -> int:
        """T of a ragged layout, Q_S of the others."""
        return int(self.query.shape[self.letters.index("T" if self.ragged else "S")])

    @property
    def query_width(self) -> int:
        """D of the query."""
        last = int(self.query.shape[-1])
        return last // self.heads if self.letters == "BSH" else last

    @property
    def single(self) -> bool:
        """Does the operator take its decode path, Q_S = 1 in a layout that is not ragged?"""
        return not self.ragged and self.query_rows == 1

    @property
    def heads_first(self) -> bool:
        """Is a paged cache (blocks, KV_N, block_size, D) instead of (blocks, block_size, H)?"""
        return self.paged and self.key.dim() == 4

    @property
    def value_width(self) -> int:
        """D of the value."""
        return self._width(self.value)

    @property
    def key_width(self) -> int:
        """D of the key."""
        return self._width(self.key)

    def _width(self, x: Tensor) -> int:
        last = int(x.shape[-1])
        flat = x.dim() == 3 and (self.paged or self.letters == "BSH")
        return last // self.kv_heads if flat else last

    def error(self, sentence: str) -> OperatorError:
        return OperatorError(f"{self.operator}: {sentence}")


def first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _MOST,
    next_tokens: int = _MOST,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **others: Any,
) -> Problem:
    """A call of the first version; ``others`` is what the emulation does not know."""
    return Problem(
        V1, query, key, value, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, block_table,
        block_size, num_heads, num_key_value_heads, scale, input_layout, sparse_mode, pre_tokens,
        next_tokens, inner_precise, softmax_lse_flag, None, key_antiquant_scale,
        key_antiquant_offset, value_antiquant_scale, value_antiquant_offset, key_antiquant_mode,
        value_antiquant_mode, others,
    )  # fmt: skip


def second(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = _MOST,
    next_tokens: int = _MOST,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Problem:
    """A call of the second version."""
    return Problem(
        V2, query, key, value, atten_mask, actual_seq_qlen, actual_seq_kvlen, block_table,
        block_size, num_query_heads, num_key_value_heads, softmax_scale, input_layout, sparse_mode,
        pre_tokens, next_tokens, inner_precise, return_softmax_lse, learnable_sink,
        dequant_scale_key, dequant_offset_key, dequant_scale_value, dequant_offset_value,
        key_quant_mode, value_quant_mode, others,
    )  # fmt: skip
