"""One call of chunk_gated_delta_rule against the recurrence; what else it may not touch."""

from __future__ import annotations

import gdn_oracle
import numpy as np
import torch

from ascend_patch.kernels import gdn


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the error over that of what is wanted."""
    if not wanted.size:
        return 0.0
    scale = np.sqrt(np.mean(wanted**2)) or 1.0
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / scale)


def judge(case: gdn_oracle.Case, seed: int, device: str = "cpu", run=None) -> tuple[float, float]:
    """Relative errors of outputs and final states; asserts that nothing else was written."""
    inputs = gdn_oracle.make_inputs(case, seed, device)
    wanted, finals = gdn_oracle.recurrence(inputs)
    v, tokens = inputs.arguments["v"], sum(case.lengths)
    out = torch.full_like(v, float("nan"), memory_format=torch.contiguous_format)
    kept = {name: x.clone() for name, x in inputs.arguments.items() if torch.is_tensor(x)}
    got, final = (run or gdn.chunk_gated_delta_rule)(**inputs.arguments, out=out)
    assert got is out
    for name, before in kept.items():
        if name != "state":
            assert torch.equal(before, inputs.arguments[name]), f"{name} was written to"
    assert out[0, tokens:].isnan().all(), "tokens of no sequence were written"
    state = inputs.arguments.get("state")
    if case.states == "cache":
        assert final is None
        untouched = sorted(set(range(len(state))) - set(inputs.slots))
        assert torch.equal(state[untouched], inputs.before[untouched]), "another slot was written"
        named = [n for n, slot in enumerate(inputs.slots) if slot >= 0]
        final, finals = state[[inputs.slots[n] for n in named]], finals[named]
    assert final is not None
    found = final.double().cpu().numpy()
    if case.layout == "VK":
        found = found.swapaxes(-1, -2)
    outs = out[0, :tokens].double().cpu().numpy()
    return relative(outs, wanted[:tokens]), relative(found, finals)
