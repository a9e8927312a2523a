"""Steps of a GDN layer: what tests run on each release, unpatched and patched.

Each case yields the requests of a step, as lengths and kinds; what the layer returned for them is
compared with the recurrence over their whole texts in float64.
"""

from __future__ import annotations

from ascend_gdn import Model

# Layouts of the states, by release and class.
LAYOUTS = {"0.13": {"qwen3_next": "KV"}, "0.18": {"qwen3_next": "VK", "qwen3_5": "KV in VK"}}


class Case:
    """Steps of requests: (request, tokens, how many of them are accepted or None, all its own).

    Args:
        steps: Each is a list of those and a number of requests that pad the batch.
        sizes: Of the layer.
    """

    def __init__(self, *steps, **sizes) -> None:
        self.steps, self.sizes = steps, sizes


def rows(*lengths, padding=0):
    return [(n, length, None) for n, length in enumerate(lengths)], padding


FIRST = rows(70, 5, 130)
CASES = {
    "prompts": Case(FIRST),
    "chunks of prompts": Case(FIRST, rows(64, 3, 66)),
    "one token beside a prompt": Case(FIRST, rows(1, 1, 66)),
    "decode": Case(FIRST, rows(1, 1, 1), rows(1, 1, 1)),
    "a prompt of one token beside decode": Case(
        rows(70, 5), rows(1, 1, 1), rows(1, 1, 1), rows(1, 3, 1)
    ),
    "a prompt of one token beside drafts": Case(
        rows(70, 5),
        ([(0, 3, 2), (1, 3, 1), (2, 1, None)], 0),
        ([(0, 3, 3), (1, 3, 2), (2, 1, None)], 0),
        drafts=2,
    ),
    "padded": Case(FIRST, rows(66, 5, 2, padding=2), rows(1, 1, 1)),
    "an empty sequence in the middle": Case(FIRST, rows(65, 0, 128), rows(1, 1, 1)),
    "sizes of K and V": Case(FIRST, rows(1, 1, 1), key_size=128, value_size=64),
    "drafts beside a prompt": Case(
        FIRST,
        # The first draft of the second request is refused; the third verifies none.
        ([(0, 3, 2), (1, 3, 1), (2, 66, None)], 0),
        ([(0, 3, 3), (1, 3, 2), (2, 1, None)], 0),
        ([(0, 3, 3), (1, 3, 3)], 0),
        drafts=2,
    ),
}
SQUARE = {"key_size": 64, "value_size": 64}


def report(kind: str, layout: str, name: str, seed: int, **sizes) -> dict:
    """Errors, root mean square over that of what is right, of each step; reads of the last two."""
    case = CASES[name]
    model = Model(kind, seed, layout, **{**case.sizes, **sizes})
    requests = [model.world.request() for _ in range(3)]
    errors, built, layers = [], [], []
    try:
        for step, padding in case.steps:
            turns = []
            for at, count, accepted in step:
                turn = requests[at].takes(count, drafts=accepted is not None)
                turns.append(turn)
            out, reads = model.step(turns, padding)
            errors.append(_error(out, turns))
            built.append(dict(reads))
            layers.append(dict(model.reads))
            for turn, (_, count, accepted) in zip(turns, step, strict=True):
                turn.keep(count if accepted is None else accepted)
    except Exception as fault:
        return {"fault": f"{type(fault).__name__}: {fault}", "errors": errors}
    return {"fault": "", "errors": errors, "builder": built, "layer": layers}


def _error(out, turns) -> float:
    worst, at = 0.0, 0
    for turn in turns:
        got = out[at : at + len(turn.new)].double()
        at += len(turn.new)
        if len(turn.new):
            scale = turn.expected.square().mean().sqrt()
            error = (got - turn.expected).square().mean().sqrt() / scale
            worst = max(worst, float(error.nan_to_num(nan=1e9)))
    return worst


def everything(release: str, seed: int) -> dict:
    """All cases of all classes of a release."""
    found = {}
    for kind, layout in LAYOUTS[release[:4]].items():
        # Where the cache says [V, K], the release itself needs them to be equal.
        sizes = SQUARE if layout == "KV in VK" else {}
        for name in CASES:
            found[f"{kind}: {name}"] = report(kind, layout, name, seed, **sizes)
    return found
