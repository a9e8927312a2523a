"""vllm-ascend's MooncakeConnectorV1 with more decode ranks than prefill ranks: it starts.

The release's worker refuses such sizes on both sides. Ours lets it start as if they were equal, and
then puts decode's size back; which ranks talk, and what they move, is in `kv_ascend_split`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DECODE_TP = "ascend_patch_decode_tp"


def get_prefill_decode_size(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker._get_prefill_decode_size: as many on both sides, for the time being.

    The check that follows it in the release's __init__ refuses more.
    """
    wrapped(*args, **kwargs)
    if instance._prefill_tp_size < instance._decode_tp_size:
        setattr(instance, DECODE_TP, instance._decode_tp_size)
        instance._decode_tp_size = instance._prefill_tp_size


def worker_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.__init__: decode's size as configured, also above prefill's.

    Raises:
        ValueError: What cannot be moved between such sizes: a sentence with both.
    """
    wrapped(*args, **kwargs)
    decode = instance.__dict__.pop(DECODE_TP, None)
    if decode is None:
        return
    reason = _cannot(instance)
    if reason is not None:
        raise ValueError(unequal(instance._prefill_tp_size, decode, reason))
    instance._decode_tp_size = decode
    # Of each stage; the release has computed 0 from the heads of a rank.
    instance.tp_num_need_pulls = 1


def unequal(prefill: int, decode: int, reason: str) -> str:
    """A refusal of more decode ranks than prefill ranks."""
    return (
        f"prefill TP {prefill} -> decode TP {decode}: {reason}; give the prefill server at least "
        "decode's --tensor-parallel-size, in both servers' kv_connector_extra_config too"
    )


def _cannot(worker: Any) -> str | None:
    if worker.pcp_size * worker.dcp_size > 1:
        return f"context parallel sizes of this server are {worker.pcp_size} and {worker.dcp_size}"
    # On releases/v0.18.0. It has no test of sizes there but the one that was passed by.
    if getattr(worker, "_is_hma_required", False):
        return "several kinds of cache (Mamba, sliding windows) are moved between equal sizes only"
    if sys.modules[type(worker).__module__].get_ascend_config().enable_kv_nz:
        return "caches in the NZ format are not cut by head"
    return None


def get_remote_ranks_for_req(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> list[list[int]]:
    """MooncakeConnectorWorker._get_remote_ranks_for_req: each prefill rank has a reader.

    What a prefill server asks of it is only which of its ranks have to wait for somebody.
    """
    tp = _prefill_tp(instance, *args, **kwargs)
    if tp < instance._decode_tp_size:
        return [list(range(tp * instance._prefill_pp_size))] * instance._decode_tp_size
    found: list[list[int]] = wrapped(*args, **kwargs)
    return found


def _prefill_tp(worker: Any, req_id: str, prefill_tp_size: int | None = None) -> int:
    return int(prefill_tp_size or worker._prefill_tp_size)
