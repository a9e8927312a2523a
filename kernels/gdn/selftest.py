"""The operators of gated delta rule layers, to be tried on the machine that they are to run on.

Trials are judged by ``oracle``, by the root mean square of an error over that of what is right: an
element is a sum over a whole prompt of products that were rounded, and its own last place says
nothing. What is not offered by default is offered here: on an NPU, the Triton kernels, none of
which has run on one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import cases, chunk, chunk_ascend, oracle
from ascend_patch.kernels.selftest import Suite, Verdict, fault

CHUNK = chunk.OPERATOR
PATCH = "gdn_attn"
# Every n-th case of the grid is a quick look: each size, layout and kind of states is among them.
QUICK = 3

# Of the relative root mean square error, by the dtype of q, in which a kernel multiplies. Rounding
# a result once is an error of 0.2 eps: 1.5e-3 in bfloat16, 1.9e-4 in float16. The state, what is
# read of it, what is written to it and the scores are rounded too, each of which weighs about as
# much as the result; float16 has more to spare, for the inverse of a chunk can be large. What is
# forgotten, a factor, a chunk or a state, is an error of 1e-2 at the least.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 4e-3, torch.float32: 2e-5}


def judge_rms(got: Tensor, value: Tensor, dtype: torch.dtype, name: str = "result") -> Verdict:
    """Compare a result with what it must be, as a whole.

    Args:
        got: On any device.
        value: float64 on the CPU, in the same shape.
        dtype: In which the operator multiplies, or the coarser one in which it keeps the result.

    Returns:
        A verdict whose ``ulps`` are the relative root mean square error in spacings of ``dtype``
        at 1; 0.2 is what rounding once costs.
    """
    if list(got.shape) != list(value.shape):
        return fault(f"{name} is {list(got.shape)} instead of {list(value.shape)}")
    found = got.detach().to("cpu", torch.float64)
    if not found.numel():
        return Verdict()
    if not found.isfinite().all():
        missing = int((~found.isfinite()).sum())
        return fault(f"{name}: {missing} of {found.numel()} elements are no finite number")
    scale = float(value.square().mean().sqrt()) or 1.0
    error = float((found - value).square().mean().sqrt()) / scale
    wrong, limit = "", LIMITS[dtype]
    if error > limit:
        wrong = f"{name}: the relative error is {error:.1e} where at most {limit:.0e} is right"
    return Verdict(error / torch.finfo(dtype).eps, error / limit, wrong)


@dataclass(frozen=True)
class ChunkTrial:
    """One call of chunk_gated_delta_rule; ``arguments`` by name, chunk_metadata among them."""

    arguments: dict[str, Any]
    operator: str = CHUNK

    @property
    def device(self) -> str:
        """The device type of its tensors."""
        return str(self.arguments["q"].device.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""
        call = self._call()
        return [i for i in dispatch.candidates(CHUNK, self.device) if i.supports(call)[0]]

    def judged(self) -> Verdict:
        """Run it: outputs and final states by the recurrence, all else as it was."""
        given = dict(self.arguments)
        out = torch.full(given["v"].shape, math.nan, dtype=given["v"].dtype).to(given["v"].device)
        given["out"] = out
        cache = given.get("state")
        if cache is not None:
            given["state"] = cache.clone()
        _, final = gdn.chunk_gated_delta_rule(**given)
        wanted, states, kept = oracle.recurrence(self.arguments)
        used = len(wanted)
        if bool((~out[0, used:].isnan()).any()):
            return fault("out: tokens behind the last sequence were written")
        dtype = out.dtype
        verdict = judge_rms(out[0, :used], wanted, dtype, "out")
        if cache is not None:
            slots = self.arguments["state_indices"].cpu()[: len(kept)].long()
            final = given["state"][slots[kept].to(cache.device)]
            others = torch.ones(len(cache), dtype=torch.bool)
            others[slots[kept]] = False
            rest = others.to(cache.device)
            if not torch.equal(given["state"][rest], cache[rest]):
                return verdict.and_also(fault("state: a slot of no sequence was written"))
            states = states[kept]
            dtype = max(dtype, cache.dtype, key=LIMITS.__getitem__)
        if final is None:
            return verdict
        found = final if self.arguments["state_layout"] == "KV" else final.transpose(-1, -2)
        return verdict.and_also(judge_rms(found, states, dtype, "final states"))

    def _call(self) -> chunk.Call:
        """What ``chunk_gated_delta_rule`` would hand to an implementation."""
        given = self.arguments
        q, k, v, g, beta = (given[name][0] for name in ("q", "k", "v", "g", "beta"))
        final = given.get("state")
        if final is None:
            last = (k.shape[2], v.shape[2])
            last = last if given["state_layout"] == "KV" else last[::-1]
            count = len(given["chunk_metadata"].starts) - 1
            final = v.new_empty(count, v.shape[1], *last, dtype=torch.float32)
        return chunk.Call(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=k.shape[2] ** -0.5,
            out=torch.empty_like(v, memory_format=torch.contiguous_format),
            metadata=given["chunk_metadata"],
            initial=given.get("state", given.get("initial_state")),
            final=final,
            state_indices=given.get("state_indices"),
            has_initial_state=given.get("has_initial_state"),
            state_layout=given["state_layout"],
            normalise=given["use_qk_l2norm_in_kernel"],
        )


def offer(device: str) -> list[tuple[str, str]]:
    """Make available what waits for a self-test; (operator, name) of what is there now."""
    if device == "npu" and chunk_ascend.register():
        return [(CHUNK, chunk_ascend.NAME)]
    return []


def _chunk_cases(everything: bool) -> list[cases.ChunkCase]:
    grid, edges = cases.correctness_cases(), cases.edge_cases()
    if everything:
        return grid + edges + cases.long_cases()
    return grid[::QUICK] + edges[::QUICK] + cases.long_cases()[:1]


def _chunk_trial(case: cases.ChunkCase, seed: int, device: str) -> ChunkTrial:
    return ChunkTrial(cases.make_inputs(case, seed, device))


SUITES = (Suite(CHUNK, PATCH, _chunk_cases, _chunk_trial, offer),)
