"""vllm-ascend's MooncakeConnectorV1: whether the ranks that it chooses hold what it needs.

The release computes which prefill ranks a decode rank reads from, on both sides, and checks
nothing: with prefill TP 8, decode TP 3 and 8 KV heads it reads from six ranks, and the heads of
the other two are missing without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ascend_patch.kernels.kv_layout import LayerGroup, Side, Topology, refuse


def side_of(vllm_config: Any, kv_caches: Mapping[str, Any], *, tp: int, pp: int) -> Side | None:
    """How an instance cuts its caches to its ranks; None for caches that are the release's own.

    Those are: several kinds of cache (Mamba), quantised ones, context parallel.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    first = next(iter(kv_caches.values()), None)
    if not isinstance(first, list | tuple) or len(first) < 2 or not isinstance(first[0], Tensor):
        return None
    context = getattr(parallel, "prefill_context_parallel_size", 1)
    context *= getattr(parallel, "decode_context_parallel_size", 1)
    if context > 1:
        return None
    if any(len(c) != len(first) or c[0].shape != first[0].shape for c in kv_caches.values()):
        return None
    dtype = first[0].dtype
    if not dtype.is_floating_point:
        return None
    text = model.hf_text_config
    heads = 1 if is_latent(model, first) else int(text.num_key_value_heads)
    held = max(1, heads // tp)
    # [blocks, tokens, heads, elements], or [blocks, tokens, heads * elements].
    widths = tuple(math.prod(cache.shape[2:]) // held for cache in first)
    return Side(
        groups=(LayerGroup(int(text.num_hidden_layers), heads, widths),),
        tp=tp,
        pp=pp,
        block_size=int(vllm_config.cache_config.block_size),
        dtype=str(dtype).rpartition(".")[2],
        itemsize=dtype.itemsize,
    )


def is_latent(model_config: Any, caches: Any) -> bool:
    """Whether each rank holds all of a token (MLA, sparse attention)."""
    return bool(model_config.is_deepseek_mla) or len(caches) == 3


def peer_side(decode: Side, *, tp: int, pp: int, partition: str | None) -> Side:
    """What a decode server's configuration says of prefill."""
    stages = tuple(int(layers) for layers in partition.split(",")) if partition else ()
    return replace(decode, tp=tp, pp=pp, stages=stages)


def wrong_ranks(
    prefill: Side, decode: Side, chosen: list[list[int]], tp_rank: int, pulls: int
) -> str | None:
    """Why a decode rank must not read from the ranks that the release chose; None if it may.

    Args:
        chosen: For each decode rank its prefill ranks, ``stage * tp + tp_rank``, stage by stage;
            the n-th of a stage is pulled to the n-th shard of the decode rank's block.
        pulls: How many the release pulls from each stage.
    """
    refusal = refuse(Topology(prefill, decode))
    if refusal is not None:
        return refusal.sentence
    ratio = Topology(prefill, decode).ratio
    if len(chosen) != decode.tp:
        return (
            f"{ratio}: prefill ranks were chosen for {len(chosen)} decode ranks, not {decode.tp}; "
            "set decode.tp_size of kv_connector_extra_config to decode's --tensor-parallel-size"
        )
    group = decode.groups[0]
    needed, mine = decode.heads(group, tp_rank), chosen[tp_rank]
    each = prefill.heads(group, 0).count
    if pulls < 1 or len(mine) != pulls * prefill.pp or pulls * each != needed.count:
        return (
            f"{ratio}: decode rank {tp_rank} needs {needed.count} of {group.kv_heads} KV heads and "
            f"would pull {pulls} times {each} from each of {prefill.pp} stages, from ranks {mine}; "
            "choose TP sizes that divide one another"
        )
    for place, rank in enumerate(mine):
        stage, shard = divmod(place, pulls)
        first = needed.first + shard * each
        if rank // prefill.tp != stage or prefill.heads(group, rank % prefill.tp).first != first:
            held = prefill.heads(group, rank % prefill.tp)
            return (
                f"{ratio}: decode rank {tp_rank} needs KV heads {first} to {first + each - 1} of "
                f"stage {stage}, and prefill rank {rank} holds {held.first} to {held.end - 1} of "
                f"stage {rank // prefill.tp}; choose TP sizes that divide one another"
            )
    return None


def heard(
    peer: Side,
    decode: Side,
    assumed_tp: int | None,
    assumed_pp: int,
    *,
    any_blocks: bool = False,
) -> str | None:
    """Why what a prefill rank says of itself does not fit; None if it does.

    Args:
        assumed_tp: prefill.tp_size of the decode server's configuration, where the release goes
            by it; None where each request brings the prefill server's own.
        assumed_pp: prefill.pp_size of it.
        any_blocks: The release matches blocks of different sizes (from 0.23).
    """
    refusal = refuse(Topology(peer, decode))
    if refusal is not None:
        return refusal.sentence
    ratio = Topology(peer, decode).ratio
    if peer.block_size != decode.block_size and not any_blocks:
        return (
            f"{ratio}: block size: prefill has {peer.block_size}, decode {decode.block_size}; "
            "set --block-size alike"
        )
    for name, assumed, found in (("tp", assumed_tp, peer.tp), ("pp", assumed_pp, peer.pp)):
        if assumed not in (None, found):
            return (
                f"{ratio}: prefill.{name}_size of decode's kv_connector_extra_config says "
                f"{assumed}; set it to {found}"
            )
    return None
