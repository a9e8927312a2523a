"""Topologies to try: by a few numbers or at random, and what vLLM's own rules say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from ascend_patch.kernels.kv_layout import (
    HND,
    NHD,
    LayerGroup,
    Plan,
    Side,
    Topology,
    plan_transfers,
)

HEADS = (1, 2, 3, 4, 6, 8, 16)
RANKS = range(1, 17)
BLOCK_SIZES = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Trial:
    """A topology and a request: ``cached`` blocks of it are decode's already."""

    topology: Topology
    tokens: int
    cached: int
    turn: int
    direction: str
    seed: int


def draw(
    prefill_tp: int,
    decode_tp: int,
    kv_heads: int,
    random: Random,
    *,
    equal_blocks: float = 0.7,
    layouts: tuple[tuple[str, str], ...] = ((NHD, NHD), (HND, HND), (HND, NHD), (NHD, HND)),
) -> Trial:
    """Everything that is not given, by chance."""
    widths = random.choice([(2, 2), (1, 3), (4,), (3, 1, 2)])
    groups = [LayerGroup(random.randint(1, 4), kv_heads, widths)]
    if random.random() < 0.2:
        groups.append(LayerGroup(random.randint(1, 2), random.choice(HEADS), (2, 1), "wide"))
    layers = sum(group.layers for group in groups)
    draft = LayerGroup(random.randint(1, 2), random.choice(HEADS), (2, 2), "draft", draft=True)
    drafted = random.choice(["none", "none", "both", "prefill"])
    sizes = [random.choice(BLOCK_SIZES) for _ in range(2)]
    if random.random() < equal_blocks:
        sizes[1] = sizes[0]
    layout = random.choice(layouts)
    itemsize = random.choice((1, 2, 4))

    def side(number: int, tp: int) -> Side:
        pp = random.randint(1, min(3, layers))
        stages: tuple[int, ...] = ()
        if random.random() < 0.4:
            cuts = sorted(random.sample(range(1, layers), pp - 1))
            stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True))
        has_draft = drafted == "both" or (drafted == "prefill" and number == 0)
        return Side(
            (*groups, draft) if has_draft else tuple(groups),
            tp,
            pp,
            sizes[number],
            layout[number],
            combined=random.random() < 0.4,
            itemsize=itemsize,
            stages=stages,
        )

    topology = Topology(side(0, prefill_tp), side(1, decode_tp))
    tokens = random.randint(1, 6 * max(sizes))
    cached = random.randint(0, max(0, -(-tokens // sizes[1]) - random.randint(0, 1)))
    return Trial(
        topology,
        tokens,
        cached,
        random.randrange(100),
        random.choice(["pull", "push"]),
        random.randrange(2**31),
    )


def can_be_served(topology: Topology) -> bool:
    """By vLLM's rules: both sides can load the model; and their blocks can be brought together."""
    sides = topology.prefill, topology.decode
    for side in sides:
        for group in topology.decode.groups:
            heads, tp = group.kv_heads, side.tp
            # QKVParallelLinear: divide(tp, heads) or divide(heads, tp), each without remainder.
            if (tp % heads if tp >= heads else heads % tp) != 0:
                return False
    sizes = sorted(side.block_size for side in sides)
    if sizes[1] % sizes[0]:
        return False
    if [side.layout for side in sides] == [NHD, HND]:
        # Only where a rank's one head makes both layouts the same.
        for group in topology.decode.groups:
            if all(group.kv_heads > side.tp for side in sides):
                return False
    return True


def compatible(kv_heads: int) -> list[int]:
    """Tensor parallel sizes that vLLM can load so many heads with."""
    return [tp for tp in RANKS if kv_heads % tp == 0 or tp % kv_heads == 0]


def topology(prefill_tp: int, decode_tp: int, kv_heads: int, **both) -> Topology:
    """Four layers, heads of 128 elements; ``both`` is of both sides."""
    group = LayerGroup(4, kv_heads, (128, 128))
    return Topology(*(Side((group,), tp, **both) for tp in (prefill_tp, decode_tp)))


def changed(given: Topology, prefill=None, decode=None, **rest) -> Topology:
    """With attributes of either side replaced."""
    return replace(
        given,
        prefill=replace(given.prefill, **(prefill or {})),
        decode=replace(given.decode, **(decode or {})),
        **rest,
    )


def planned(given: Topology, direction: str = "pull", turn: int = 0) -> Plan:
    """Its plan; a refusal fails."""
    plan = plan_transfers(given, direction=direction, turn=turn)
    assert isinstance(plan, Plan), plan
    return plan
