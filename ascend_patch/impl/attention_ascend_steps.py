"""A step of vllm-ascend's attention as a case, and the call that its route names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ascend_patch._log import get_logger
from ascend_patch.impl import left_to_host
from ascend_patch.kernels.attention.attend import Batch, attend
from ascend_patch.kernels.attention.case import HOST, Case, Route
from ascend_patch.kernels.attention.route import route

logger = get_logger(__name__)

PATCH = "attention_router"
MODULE = "vllm_ascend.attention.attention_v1"
BASE = "AscendAttentionBackendImpl"
METADATA = "AscendMetadata"
STATES = {
    "PrefillNoCache": "prefill",
    "PrefillCacheHit": "cache_hit",
    "ChunkedPrefill": "chunked",
    "DecodeOnly": "decode",
    "SpecDecoding": "speculative",
}
# Set on a step's metadata.
KEPT = "_ascend_patch_batch"
_said: set[str] = set()


class Configuration(NamedTuple):
    """What a layer's route depends on beside the step."""

    head_size: int
    num_heads: int
    num_kv_heads: int
    window: int | None
    sinks: bool

    def __str__(self) -> str:
        """As messages have it."""
        window = "" if self.window is None else f", window {self.window}"
        sinks = ", sinks" if self.sinks else ""
        return f"heads {self.num_heads}:{self.num_kv_heads} of {self.head_size}{window}{sinks}"


# Rows of the table that the self-test at load found wrong for a configuration.
withdrawn: set[tuple[str, Configuration]] = set()


class Step(NamedTuple):
    """The arguments of `forward`, by the names that every release gives them."""

    layer: Any
    query: Tensor
    key: Tensor | None
    value: Tensor | None
    kv_cache: Any
    attn_metadata: Any
    output: Any = None
    output_scale: Any = None
    output_block_scale: Any = None
    trace_flag: bool = False


def is_plain(instance: Any, name: str = BASE) -> bool:
    """Whether it is of the class itself: context parallel, 310P and others inherit its forward."""
    kind = type(instance)
    return kind.__name__ == name and kind.__module__ == MODULE


def is_of_the_builder(metadata: Any) -> bool:
    """Whether a step's metadata is of the release's class; None before there are any."""
    kind = type(metadata)
    return kind.__name__ == METADATA and kind.__module__ == MODULE


def configuration(instance: Any) -> Configuration:
    """That of an instance of the release's class."""
    return Configuration(
        instance.head_size,
        instance.num_heads,
        instance.num_kv_heads,
        instance.sliding_window,
        getattr(instance, "sinks", None) is not None,
    )


def is_capturing(instance: Any) -> bool:
    """Whether a graph is being captured, as the release asks it."""
    release = sys.modules[type(instance).__module__]
    extra = getattr(release, "_EXTRA_CTX", None)
    context = release.get_forward_context() if extra is None else extra
    return bool(getattr(context, "capturing", False))


def left_captured(wrapped: Any, defect: str, args: Any, kwargs: Any) -> Any:
    """Run the release's own: it replays what it captured itself. The state says what is wrong."""
    metadata = args[5] if len(args) > 5 else kwargs["attn_metadata"]
    left(f"{defect} in captured {STATES[metadata.attn_state.name]}")
    return wrapped(*args, **kwargs)


def left(reason: str) -> None:
    """Count a step that the release computes, wrong as it may be; the patch's state says so."""
    left_to_host.count(PATCH, reason)


def left_for_kind(instance: Any, metadata: Any, defect: str) -> None:
    """The same where the class is another one, or a step's metadata: these are not understood."""
    if metadata is None or not defect:
        return  # a profiling run, or a layer that the release computes right
    kind = instance if not is_plain(instance) else metadata
    left(f"{defect} by {type(kind).__name__}, which no code here is written for")


def hides_something(window: int | None, metadata: Any) -> bool:
    """Whether a request of the step is longer than the window."""
    return window is not None and max(metadata.seq_lens_list, default=0) > window


def answered(
    instance: Any,
    step: Step,
    defect: str,
    cached: Callable[[Any, Step], tuple[Any, Any]],
) -> bool:
    """Compute the step by its route into `step.output`.

    Args:
        cached: Writes the step's keys to the cache as the release does; gives them back.

    Returns:
        False where the release's own must run: nothing has been touched.
    """
    layer, metadata = step.layer, step.attn_metadata
    if step.output is None or step.output_scale is not None or step.output_block_scale is not None:
        left(f"{defect}, and left so: the output is quantised, or none was given")
        return False
    if layer._k_scale_float != 1.0 or layer._v_scale_float != 1.0:
        left(f"{defect}, and left so: keys or values have a scale other than 1")
        return False
    caches = _caches(instance, step.kv_cache)
    case, batch = _case(instance, step, caches)
    if is_capturing(instance):
        left(f"{defect} in captured {case.state}")
        return False
    found = route(case)
    if withdrawn and (found.row, configuration(instance)) in withdrawn:
        left(f"{defect}, and left so: the self-test at load found {found.operator} wrong too")
        return False
    if not _can_be_taken(found, case, step, caches, defect):
        return False
    key, value = step.key, step.value
    # The operator that writes the cache takes no empty keys.
    if key is not None and value is not None and metadata.num_actual_tokens:
        key, value = cached(instance, step)
        caches = _caches(instance, step.kv_cache)
    attend(
        found,
        batch,
        step.query,
        key,
        value,
        *caches,
        step.output,
        num_heads=instance.num_heads,
        num_kv_heads=instance.num_kv_heads,
        head_size=instance.head_size,
        scale=instance.scale,
        sinks=getattr(instance, "sinks", None),
    )
    return True


def _can_be_taken(
    found: Route, case: Case, step: Step, caches: tuple[Any, Any], defect: str
) -> bool:
    if found.operator == HOST:
        left(f"{defect}, and left so. {found.reason}")
        return False
    missing = step.key is None if found.cache == "none" else caches[0] is None
    if missing and case.batch:
        # A profiling run before there is a cache, or a layer that shares another's keys.
        left(f"{defect}, and left so: there is no cache, or there are no keys, in this step")
        return False
    _say_once(f"{defect} by the release in state {case.state}; {found.row}: {found.operator}")
    return True


def _caches(instance: Any, kv_cache: Any) -> tuple[Any, Any]:
    """Those of this call, as the release finds them; nothing is kept (the host may rebind them)."""
    if instance.key_cache is not None:
        return instance.key_cache, instance.value_cache
    return (kv_cache[0], kv_cache[1]) if len(kv_cache) > 1 else (None, None)


def _case(instance: Any, step: Step, caches: tuple[Any, Any]) -> tuple[Case, Batch]:
    metadata, query = step.attn_metadata, step.query
    # In later releases an enumeration, whose members are equal to these words and hash otherwise.
    attn_type = getattr(instance.attn_type, "value", instance.attn_type)
    state = STATES[metadata.attn_state.name]
    ends, lens = metadata.actual_seq_lengths_q, metadata.seq_lens_list
    if state == "decode" and len(lens) == query.shape[0] != len(ends):
        # 0.11.0 pads the lengths to a graph's size, and the ends to one less.
        ends = list(range(1, len(lens) + 1))
    if attn_type in ("encoder", "encoder_only"):
        lens = [end - start for start, end in zip([0, *ends], ends, strict=False)][: len(lens)]
    tokens = ends[-1] if ends else 0
    if state == "prefill" and lens and sum(lens) != ends[len(lens) - 1]:
        # A dummy step: what it says of its requests is made up.
        state = "chunked"
    window = instance.sliding_window
    cache = caches[0]
    case = Case(
        state,
        causal=getattr(metadata, "causal", True),
        head_size=instance.head_size,
        num_heads=instance.num_heads,
        num_kv_heads=instance.num_kv_heads,
        sliding_window=window,
        sinks=getattr(instance, "sinks", None) is not None,
        pooling=getattr(metadata, "model_runner_type", "") == "pooling",
        attn_type=attn_type,
        dtype=_name(query),
        kv_dtype="auto" if cache is None or cache.dtype == query.dtype else _name(cache),
        block_size=128 if cache is None else cache.shape[1],
        max_query_len=min(metadata.max_query_len or 1, tokens),
        max_seq_len=0 if window is None else max(lens, default=0),
        batch=len(lens) if tokens else 0,
        padded=len(ends) != len(lens) or query.shape[0] > tokens,
        soc=system(query.device),
    )
    return case, _batch(metadata, ends, lens, tokens)


def _batch(metadata: Any, ends: list[int], lens: list[int], tokens: int) -> Batch:
    """The requests of a step, kept with its metadata: layers have them sorted once.

    A draft model's steps share metadata and change its lengths, in place or by other lists.
    """
    table = metadata.block_tables
    kept: Batch | None = getattr(metadata, KEPT, None)
    if (
        kept is None
        or kept.block_table is not table
        or kept.num_tokens != tokens
        or kept.query_ends != ends
        or kept.seq_lens != lens
    ):
        kept = Batch(list(ends), list(lens), table, tokens)
        setattr(metadata, KEPT, kept)
    return kept


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def system(device: Any) -> str:
    """A2, A3, 310P or A5, as the release says; `emulated` for tensors of a CPU."""
    return _system() if device.type == "npu" else "emulated"


@lru_cache(maxsize=1)
def _system() -> str:
    utils = sys.modules["vllm_ascend.utils"]
    ask = getattr(utils, "get_ascend_device_type", None) or utils.get_ascend_soc_version
    name: str = ask().name
    return name.lstrip("_")


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        logger.info("attention: %s", sentence)
