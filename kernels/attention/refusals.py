"""What is left to the host, with the sentence that says so; asked before the rows of ``table``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ascend_patch.kernels.attention.case import ATTENTION_TYPES, DTYPES, STATES, SYSTEMS, Case
from ascend_patch.kernels.attention.table import BAND_HEAD_SIZES, is_causal, reads_cache

# 128 and 192 are documented for TND; 64 is not, and vllm-ascend serves with it. 256 goes in BSH.
HEAD_SIZES = (64, 128, 192, 256)
SINK_HEAD_SIZES = BAND_HEAD_SIZES
LATENT_HEAD_SIZES = (512, 576)
WIDEST_FUSION_HEAD = 768
MOST_HEADS, MOST_QUERIES_A_KEY_HEAD = 256, 64
MOST_REQUESTS, MOST_REQUESTS_FUSION = 4096, 1024
# Elements of a token's keys in a cache of blocks [block_size, KV heads * head_size].
WIDEST_TOKEN = 65535


@dataclass(frozen=True)
class Refusal:
    """Cases that are left to the host, and the sentence that says so; {case.x} is the case's."""

    name: str
    when: Callable[[Case], bool]
    found: str
    expected: str

    def sentence(self, case: Case) -> str:
        """What was found, what was expected, what happens instead."""
        return f"{self.found.format(case=case)}; {self.expected}: the host's own attention runs."


def _by_fusion(case: Case) -> bool:
    return not is_causal(case) and not reads_cache(case)


REFUSALS = (
    Refusal(
        "system",
        lambda case: case.soc not in SYSTEMS,
        "The system is {case.soc}",
        "these operators are documented for A2 and A3",
    ),
    Refusal(
        "state",
        lambda case: case.state not in STATES,
        "The state is {case.state!r}",
        f"it must be one of {', '.join(STATES)}",
    ),
    Refusal(
        "attention type",
        lambda case: case.attn_type not in ATTENTION_TYPES,
        "The attention type is {case.attn_type!r}",
        f"it must be one of {', '.join(ATTENTION_TYPES)}",
    ),
    Refusal(
        "capture",
        lambda case: case.capturing,
        "A graph is being captured",
        "the host replays what it captured itself, with arguments of its own",
    ),
    Refusal(
        "quantised cache",
        lambda case: case.kv_dtype not in ("auto", case.dtype),
        "The cache holds {case.kv_dtype}, and the model computes in {case.dtype}",
        "it must hold the model's own dtype, since scales are the host's",
    ),
    Refusal(
        "dtype",
        lambda case: case.dtype not in DTYPES,
        "The dtype is {case.dtype}",
        "it must be bfloat16 or float16",
    ),
    Refusal(
        "float32",
        lambda case: case.dtype == "float32" and case.soc != "emulated" and not _by_fusion(case),
        "The dtype is float32",
        "the fused inference operator takes bfloat16 and float16",
    ),
    Refusal(
        "latent heads",
        lambda case: case.head_size in LATENT_HEAD_SIZES and not _by_fusion(case),
        "A head has {case.head_size} elements",
        "latent attention, and other heads as wide, need operators of their own",
    ),
    Refusal(
        "head size",
        lambda case: (
            case.head_size not in (*HEAD_SIZES, *LATENT_HEAD_SIZES) and not _by_fusion(case)
        ),
        "A head has {case.head_size} elements",
        f"the routes take {', '.join(map(str, HEAD_SIZES))}",
    ),
    Refusal(
        "fusion head size",
        lambda case: not 1 <= case.head_size <= WIDEST_FUSION_HEAD,
        "A head has {case.head_size} elements",
        f"the fusion operator takes 1 to {WIDEST_FUSION_HEAD}",
    ),
    Refusal(
        "heads",
        lambda case: case.num_kv_heads < 1 or case.num_heads % case.num_kv_heads != 0,
        "There are {case.num_heads} query heads and {case.num_kv_heads} key heads",
        "the first must be a multiple of the second",
    ),
    Refusal(
        "too many heads",
        lambda case: (
            case.num_heads > MOST_HEADS
            or case.num_heads > MOST_QUERIES_A_KEY_HEAD * case.num_kv_heads
        ),
        "There are {case.num_heads} query heads on {case.num_kv_heads} key heads",
        f"the limits are {MOST_HEADS}, and {MOST_QUERIES_A_KEY_HEAD} on one key head",
    ),
    Refusal(
        "wide token",
        lambda case: reads_cache(case) and case.num_kv_heads * case.head_size > WIDEST_TOKEN,
        "A token's keys are {case.num_kv_heads} heads of {case.head_size} elements",
        f"a paged cache takes at most {WIDEST_TOKEN} elements",
    ),
    Refusal(
        "requests",
        lambda case: case.batch > (MOST_REQUESTS_FUSION if _by_fusion(case) else MOST_REQUESTS),
        "The batch has {case.batch} requests",
        f"TND takes {MOST_REQUESTS}, the fusion operator {MOST_REQUESTS_FUSION}",
    ),
    Refusal(
        "window",
        lambda case: case.sliding_window is not None and case.sliding_window < 1,
        "The sliding window is {case.sliding_window}",
        "it counts the query's own token, so it must be at least 1",
    ),
    Refusal(
        "sinks without a causal mask",
        lambda case: case.sinks and not is_causal(case),
        "There are sinks, and the attention is not causal",
        "no model has that, so no operator was tried",
    ),
    Refusal(
        "sinks' head size",
        lambda case: case.sinks and case.head_size not in SINK_HEAD_SIZES,
        "There are sinks, and a head has {case.head_size} elements",
        "with sinks the operator takes 64 and 128",
    ),
    Refusal(
        "sinks' dtype",
        lambda case: case.sinks and case.dtype == "float16",
        "There are sinks, and the dtype is float16",
        "sinks must be bfloat16, and so must the rest",
    ),
)
