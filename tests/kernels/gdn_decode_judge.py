"""One call of recurrent_gated_delta_rule against fp64; what else it may not touch."""

from __future__ import annotations

import gdn_judge
import numpy as np
import torch
from gdn_decode_oracle import DecodeCase, decode, make_decode

from ascend_patch.kernels import gdn


def judge_decode(case: DecodeCase, seed: int, device: str = "cpu", run=None) -> tuple[float, float]:
    """Relative errors of outputs and of written states; asserts that nothing else was written."""
    inputs = make_decode(case, seed, device)
    given = inputs.arguments
    wanted, written = decode(inputs)
    v, tokens = given["v"], sum(case.counts)
    out = torch.full_like(v, float("nan"), memory_format=torch.contiguous_format)
    kept = {name: x.clone() for name, x in given.items() if torch.is_tensor(x)}
    state = given["state"]
    room = state.as_strided((state.untyped_storage().nbytes() // state.element_size(),), (1,), 0)
    behind = room.clone()
    got = (run or gdn.recurrent_gated_delta_rule)(**given, out=out)
    assert got is out
    for name, before in kept.items():
        if name != "state":
            assert torch.equal(before, given[name]), f"{name} was written to"
    assert out[0, tokens:].isnan().all(), "tokens of no request were written"
    untouched = sorted(set(range(len(state))) - set(written))
    assert torch.equal(state[untouched], inputs.before[untouched]), "another slot was written"
    size = state[0].numel()
    pages = room.reshape(len(state), -1)[:, size:], behind.reshape(len(state), -1)[:, size:]
    assert torch.equal(*pages), "what is behind a slot was written"
    padded = [s[b] < 0 for s, b in zip(inputs.slots, inputs.begins, strict=True)]
    rows = np.flatnonzero(np.repeat(np.array(padded, dtype=bool), case.counts))
    assert (out[0, rows.tolist()] == 0).all(), "padding is not zero"
    named = sorted(written)
    found = state[named].double().cpu().numpy()
    found = found if case.layout == "KV" else found.swapaxes(-1, -2)
    states = np.stack([written[slot] for slot in named]) if named else np.zeros((0,))
    outs = out[0, :tokens].double().cpu().numpy()
    return gdn_judge.relative(outs, wanted[:tokens]), gdn_judge.relative(found, states)
