"""Topologies that no plan is made for: the table, and a sentence with both sides' numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ascend_patch.kernels.kv_layout.topology import (
    HND,
    LAYOUTS,
    NHD,
    HeadRange,
    LayerGroup,
    Side,
    Topology,
)


@dataclass(frozen=True)
class Refusal:
    """Why there is no plan: a row's name, and what was found, what was expected, what to do."""

    name: str
    sentence: str


@dataclass(frozen=True)
class Row:
    """A kind of topology that is refused. ``find`` says what was found, or None."""

    name: str
    find: Callable[[Topology], str | None]
    advice: str

    def refusal(self, topology: Topology) -> Refusal | None:
        """The refusal of a topology that this row is about."""
        found = self.find(topology)
        if found is None:
            return None
        return Refusal(self.name, f"{topology.ratio}: {found}; {self.advice}.")


def _sides(topology: Topology) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("prefill", topology.prefill), ("decode", topology.decode)


def _both(topology: Topology, name: str) -> str:
    values = (getattr(side, name) for _, side in _sides(topology))
    return "prefill has {}, decode {}".format(*values)


def _sizes(topology: Topology) -> str | None:
    for name, side in _sides(topology):
        whole = (side.tp, side.pp, side.block_size, side.itemsize, side.context_parallel)
        counts = [n for g in side.groups for n in (g.layers, g.kv_heads, *g.widths)]
        if not counts or min(*whole, *counts, *side.stages) < 1:
            return f"a size of the {name} side is below 1 or missing: {side}"
        if side.layout not in LAYOUTS:
            return f"the layout of the {name} side is {side.layout!r}, not NHD or HND"
        if len({group.name for group in side.groups}) != len(side.groups):
            return f"two groups of layers of the {name} side have one name"
        if [group.draft for group in side.groups] != sorted(group.draft for group in side.groups):
            return f"draft layers of the {name} side come before others"
    return None


def _kv_cache_groups(topology: Topology) -> str | None:
    if topology.prefill.kv_cache_groups == topology.decode.kv_cache_groups == 1:
        return None
    return "KV cache groups: " + _both(topology, "kv_cache_groups")


def _context_parallel(topology: Topology) -> str | None:
    if topology.prefill.context_parallel == topology.decode.context_parallel == 1:
        return None
    return "context parallel size: " + _both(topology, "context_parallel")


def _storage(topology: Topology) -> str | None:
    if topology.prefill.storage == topology.decode.storage == "plain":
        return None
    return "storage of the cache: " + _both(topology, "storage")


def _dtype(topology: Topology) -> str | None:
    prefill, decode = topology.prefill, topology.decode
    if (prefill.dtype, prefill.itemsize) == (decode.dtype, decode.itemsize):
        return None
    each = (f"{side.dtype} of {side.itemsize} bytes" for side in (prefill, decode))
    return "dtype of the cache: prefill has {}, decode {}".format(*each)


def _quantised(topology: Topology) -> str | None:
    return None if topology.decode.dtype != "int8" else "the caches hold int8"


def _layers(topology: Topology) -> str | None:
    for wanted in topology.decode.groups:
        found = topology.prefill.group(wanted.name)
        if found is None:
            return (
                f"decode has {wanted.layers} layers {wanted.name!r} and prefill has "
                f"{', '.join(repr(group.name) for group in topology.prefill.groups)}"
            )
        if found != wanted:
            return f"layers {wanted.name!r}: prefill has {_said(found)}, decode {_said(wanted)}"
    for group in topology.prefill.groups:
        if not group.draft and topology.decode.group(group.name) is None:
            return f"prefill has {group.layers} layers {group.name!r} and decode has none"
    names = [[g.name for g in side.groups if not g.draft] for _, side in _sides(topology)]
    if names[0] != names[1]:
        return f"the order of layers: prefill has {names[0]}, decode {names[1]}"
    return None


def _said(group: LayerGroup) -> str:
    kind = "draft layers" if group.draft else "layers"
    return f"{group.layers} {kind} of {group.kv_heads} KV heads of {group.widths} elements"


def _heads(topology: Topology) -> str | None:
    for name, side in _sides(topology):
        for group in topology.decode.groups:
            if group.kv_heads % side.tp and side.tp % group.kv_heads:
                other = topology.decode if side is topology.prefill else topology.prefill
                return (
                    f"{group.kv_heads} KV heads of layers {group.name!r} cannot be cut or "
                    f"replicated evenly to {side.tp} {name} ranks ({other.tp} on the other side)"
                )
    return None


def _stages(topology: Topology) -> str | None:
    for name, side in _sides(topology):
        if len(side.stage_layers) != side.pp or sum(side.stage_layers) != side.layers:
            return (
                f"the {side.pp} pipeline stages of {name} hold {side.stage_layers} layers, "
                f"and the model has {side.layers}"
            )
        if min(side.stage_layers) < 1:
            return f"{side.layers} layers do not fill the {side.pp} pipeline stages of {name}"
    return None


def _block_size(topology: Topology) -> str | None:
    sizes = topology.prefill.block_size, topology.decode.block_size
    return "block size: " + _both(topology, "block_size") if max(sizes) % min(sizes) else None


def _layout(topology: Topology) -> str | None:
    if (topology.prefill.layout, topology.decode.layout) != (NHD, HND):
        return None
    for group in topology.shared:
        counts = [side.heads(group, 0).count for _, side in _sides(topology)]
        if min(counts) > 1:
            return "layout: prefill has NHD with {} KV heads on a rank, decode HND with {}".format(
                *counts
            )
    return None


def _chosen(topology: Topology) -> str | None:
    if topology.chosen is None:
        return None
    prefill, decode = topology.prefill, topology.decode
    if len(topology.chosen) != decode.tp:
        return f"prefill ranks were chosen for {len(topology.chosen)} decode ranks, not {decode.tp}"
    for rank, chosen in enumerate(topology.chosen):
        if not all(0 <= p < prefill.tp for p in chosen):
            return f"decode rank {rank} is to read from prefill ranks {chosen} of {prefill.tp}"
        for group in topology.shared:
            needed = decode.heads(group, rank)
            held = {h for p in chosen for h in _held(prefill.heads(group, p))}
            missing = sorted(set(_held(needed)) - held)
            if missing:
                return (
                    f"decode rank {rank} needs KV heads {needed.first} to {needed.end - 1} of "
                    f"layers {group.name!r}, and prefill ranks {chosen} lack {missing}"
                )
    return None


def _held(heads: HeadRange) -> range:
    return range(heads.first, heads.end)


REFUSALS = (
    Row("sizes", _sizes, "each must be at least 1, each group of layers named: check the config"),
    Row(
        "KV cache groups",
        _kv_cache_groups,
        "a request must have one list of blocks: models with several kinds of cache (Mamba, "
        "sliding window) are not moved yet",
    ),
    Row("context parallel", _context_parallel, "both must be 1: serve without PCP and DCP"),
    Row("storage", _storage, "both must be plain: switch the NZ format of the KV cache off"),
    Row("dtype", _dtype, "both must be alike: set --kv-cache-dtype and --dtype alike"),
    Row("int8", _quantised, "their scales are not moved: serve with an unquantised KV cache"),
    Row("layers", _layers, "both must run one model, and decode no draft model without prefill"),
    Row("heads", _heads, "the TP size must divide the number of KV heads, or be a multiple of it"),
    Row("stages", _stages, "give each stage's layers, as VLLM_PP_LAYER_PARTITION does"),
    Row("block size", _block_size, "one must divide the other: set --block-size alike"),
    Row("layout", _layout, "a rank can hold NHD in HND's place only with one head: set them alike"),
    Row("chosen ranks", _chosen, "the two sides count TP ranks or KV heads differently"),
)


def refuse(topology: Topology) -> Refusal | None:
    """The first row's refusal, or None: there is a plan."""
    for row in REFUSALS:
        refusal = row.refusal(topology)
        if refusal is not None:
            return refusal
    return None
