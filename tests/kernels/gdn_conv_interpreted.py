"""Run by test_gdn_conv_triton.py: the convolution kernels on CPU tensors, interpreted.

Prints each case's error as JSON, as a share of what is allowed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from gdn_conv_judge import judge_conv
from gdn_conv_oracle import ConvCase, make_conv
from gdn_conv_steps import in_drafts, in_pieces, in_tokens, make_stream, whole

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import conv_tiles, conv_triton

RAGGED = (1, 0, 2, 64, 66, 3)
PREFILL = (
    *(ConvCase(RAGGED, width=width, places=width + 1) for width in (2, 3, 4, 5)),
    ConvCase(RAGGED, padded=(2, 3), tail=3, cache="gaps", dtype="bfloat16", columns=True),
    ConvCase(RAGGED, padded=(0,), tail=3, given=True, sliced=True, channels=20),
    ConvCase(RAGGED, cache="plain", table=False, bias=False, padded=(5,), tail=70),
    ConvCase(RAGGED, cache="none", silu=False, channels=1, width=3),
    ConvCase((130,), dtype="float16", weight_dtype="float32", table=False, columns=True),
    ConvCase((0, 0)),
)
UPDATE = (
    *(ConvCase((1,) * 5, width=width, plain=True, places=6) for width in (2, 3, 4, 5)),
    ConvCase((1,) * 5, plain=True, padded=(0, 3), cache="gaps", dtype="bfloat16", columns=True),
    ConvCase((1,) * 5, plain=True, padded=(4,), given=True, sliced=True, channels=20),
    ConvCase((1, 0, 3, 2, 7), padded=(3,), tail=2, cache="plain", bias=False),
    *(
        ConvCase((3, 0, 1, 2), width=width, places=width + 2, accepted=(1, 2, 3, 1), tail=1)
        for width in (2, 3, 4, 5)
    ),
    ConvCase((4, 4, 4), places=6, accepted=(4, 1, 2), padded=(1,), dtype="bfloat16", given=True),
)
# Of a CUDA device and of an NPU, but with several blocks of these few channels.
TILES = {"cuda": conv_tiles.Tiles(16, 32, rolls=False), "npu": conv_tiles.Tiles(16)}


def judged(seed: int) -> dict[str, float]:
    found = {}
    for update, cases in ((False, PREFILL), (True, UPDATE)):
        for case in cases:
            cut = 2 if case.dtype == "bfloat16" else 1
            name = f"{'update' if update else 'prefill'} {case}"
            found[name] = judge_conv(case, seed, update=update, cut=cut)
    return found


def few(items: int, channels: int, tiles: conv_tiles.Tiles, cores: int) -> int:
    """An NPU's grid is fixed: programs go over chunks, and over sequences."""
    blocks = -(-channels // tiles.channels)
    return blocks * min(items, 2)


def cut_up(width: int, seed: int) -> dict[str, bool]:
    """Whether each way to cut a stream up has the bits of the whole, silu included."""
    stream = make_stream((1, 5, 67), width, "float32", seed, activation="silu")
    wanted, state = whole(stream)
    found = {}
    for way in (in_pieces, in_tokens, in_drafts):
        out, after = way(stream)
        found[way.__name__] = bool(torch.equal(out, wanted) and torch.equal(after, state))
    return found


def forgetful(seed: int) -> float:
    """The control: a kernel that is not told of the state."""

    def run(has_initial_state, **rest):
        return gdn.causal_conv1d(has_initial_state=torch.zeros_like(has_initial_state), **rest)

    return judge_conv(ConvCase((9,) * 12), seed, run=run)


def in_place(seed: int) -> bool:
    """Over x itself, and with a slot below zero that is not -1."""
    inputs = make_conv(replace(UPDATE[2], padded=(1,)), seed, update=True)
    given = inputs.arguments
    # Nobody else's is the slot that it would be taken for.
    if 0 in given["state_indices"]:
        return in_place(seed + 1)
    given["state_indices"][1], given["x"][1] = -7, 3.0
    out = gdn.causal_conv1d_update(**given, out=given["x"])
    torch.testing.assert_close(given["conv_state"], inputs.cache, rtol=0, atol=0, equal_nan=True)
    return bool(torch.isfinite(out).all() and (out[1] == 3.0).all())


if __name__ == "__main__":
    seed = int(sys.argv[1])
    conv_triton.register("cpu")
    found: dict = {}
    with dispatch.only(conv_triton.NAME):
        for kind, tiles in TILES.items():
            conv_tiles.programs = few if kind == "npu" else conv_tiles.programs
            conv_tiles.prefill_tiles = lambda *_, tiles=tiles: tiles
            conv_tiles.update_tiles = lambda *_, tiles=tiles: tiles
            found[kind] = judged(seed)
            found[f"{kind} cut"] = {w: cut_up(w, seed) for w in (2, 4)}
        found["control"] = forgetful(seed)
        found["in place"] = in_place(seed)
    print(json.dumps(found))
