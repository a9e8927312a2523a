"""More decode ranks than prefill ranks of MooncakeConnectorV1; import it after `ascend_kv`."""

from __future__ import annotations

from ascend_kv import TOKENS, Pair
from ascend_kv_engine import Engine
from ascend_kv_pulled import LOCAL, REMOTE, pulled

# Prefill TP, decode TP, KV heads: cut, replicated on one side or both, and cut across ranks.
SPLITS = (
    (1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 4, 4), (2, 4, 8), (1, 2, 1), (2, 4, 1), (2, 4, 2),
    (1, 4, 2), (2, 8, 4), (2, 3, 6),
)  # fmt: skip


def splits(seed: int) -> dict:
    """More decode ranks than prefill ranks."""
    return {
        f"{p} -> {d}, {heads} heads": pulled(Pair(p, d, heads, seed=seed), "one")
        for p, d, heads in SPLITS
    }


def starts(seed: int) -> str:
    """What the release's worker says to more decode ranks than prefill ranks."""
    try:
        Pair(1, 2, 2, seed=seed)
    except ValueError as error:
        return str(error)
    return ""


def split_readers(seed: int) -> dict:
    """Decode ranks that read one after the other; then a request whose blocks decode has."""
    pair = Pair(2, 4, 4, seed=seed)
    pair.offer("one")
    heard, freed = [], []
    for worker in pair.decode:
        worker.start_load_kv(pair.metadata("one", LOCAL, REMOTE))
        heard.append(pair.heard(worker, "one"))
        freed.append(pair.freed("one", 0.4))
    found = {"heard": heard, "freed": freed, "right": pair.right(LOCAL, REMOTE)}
    pair.offer("cached")
    cached = pair.pull("cached", [], REMOTE)
    return {"one": found, "cached": {"heard": cached, "freed": pair.freed("cached", 2.0)}}


def split_fails(seed: int) -> dict:
    """The engine fails for the first decode rank that reads, once; then for good."""
    pair = Pair(1, 2, 2, seed=seed)
    Engine.codes = [-1]
    again = pulled(pair, "one")
    Engine.codes = [-1] * 3
    pair = Pair(1, 2, 2, seed=seed, pull_retries=2)
    pair.offer("two")
    heard = []
    for worker in pair.decode:
        worker.start_load_kv(pair.metadata("two", LOCAL, REMOTE))
        heard.append(pair.heard(worker, "two"))
    Engine.codes = []
    return {"again": again, "heard": heard, "freed": pair.freed("two", 2.0)}


def split_refused(seed: int) -> dict:
    """Prefill has told its ranks of other sizes; decode has blocks of other sizes."""
    return {
        "would not wait": pulled(Pair(2, 4, 1, seed=seed, told=(2, 1)), "one"),
        "other blocks": pulled(Pair(1, 2, 2, seed=seed, tokens=2 * TOKENS), "one"),
        "3 heads": pulled(Pair(1, 2, 3, seed=seed), "one"),
    }
