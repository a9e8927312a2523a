"""Calls of the convolution and of the gates on random inputs, and their answers in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import (
    ChunkMetadata,
    build_chunk_metadata,
    causal_conv1d,
    conv,
    fused_gating,
    gating,
)
from ascend_patch.kernels.gdn.selftest import judge_rms
from ascend_patch.kernels.selftest import Verdict, fault


@dataclass(frozen=True)
class ConvTrial:
    """A prefill of sequences of these lengths, each other of which has a state to begin with."""

    lengths: tuple[int, ...]
    channels: int
    kernel: int
    dtype: torch.dtype
    on: torch.device
    seed: int
    operator: str = conv.OPERATOR

    @property
    def device(self) -> str:
        """The device type of its tensors."""
        return str(self.on.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""
        x, weight, state, _ = self._inputs()
        metadata = self._metadata()
        slots, carried = self._states()
        call = conv.Call(
            x=x, weight=weight, bias=None, silu=True, conv_state=state, state_indices=slots,
            has_initial_state=carried, metadata=metadata, starts=metadata.cu_seqlens,
            out=torch.empty_like(x), fill=True,
        )  # fmt: skip
        return [i for i in dispatch.candidates(self.operator, self.device) if i.supports(call)[0]]

    def judged(self) -> Verdict:
        """Run it: outputs, the states of its sequences, and all others as they were."""
        x, weight, state, before = self._inputs()
        slots, carried = self._states()
        got = causal_conv1d(
            x,
            weight,
            activation="silu",
            conv_state=state,
            state_indices=slots,
            has_initial_state=carried,
            chunk_metadata=self._metadata(),
        )
        wanted, states = self._answer(x, weight, before)
        verdict = judge_rms(got, wanted, self.dtype, "out")
        if not torch.equal(state.cpu(), states.to(self.dtype)):
            return verdict.and_also(fault("conv_state is not the last inputs of each sequence"))
        return verdict

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, C], a slice of wider rows; weight [C, W]; the cache as vLLM's, and what it held."""
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(self.dtype)

        x = drawn(sum(self.lengths), self.channels + 8).to(self.on)[:, : self.channels]
        weight = drawn(self.channels, self.kernel).to(self.on)
        state = drawn(2 * len(self.lengths), self.kernel - 1, self.channels)
        return x, weight, state.clone().to(self.on).transpose(1, 2), state.transpose(1, 2)

    def _states(self) -> tuple[Tensor, Tensor]:
        """Slots in reverse order, with gaps; which sequences have a state."""
        count = len(self.lengths)
        slots = torch.arange(2 * count - 1, 0, -2, dtype=torch.int32)
        return slots.to(self.on), (torch.arange(count) % 2 == 0).to(self.on)

    def _metadata(self) -> ChunkMetadata:
        starts = torch.tensor((0, *accumulate(self.lengths)), dtype=torch.int32)
        return build_chunk_metadata(starts, self.on)

    def _answer(self, x: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        rows, taps = x.double().cpu(), weight.double().cpu()
        out, states = torch.zeros_like(rows), before.double()
        slots, carried = (part.tolist() for part in self._states())
        starts = (0, *accumulate(self.lengths))
        for n, length in enumerate(self.lengths):
            held = before[slots[n]].double().T
            text = torch.cat(
                (held if carried[n] else torch.zeros_like(held), rows[starts[n] :][:length])
            )
            for t in range(length):
                total = (text[t : t + self.kernel].T * taps).sum(1)
                out[starts[n] + t] = total / (1 + (-total).exp())
            if length:
                states[slots[n]] = text[length:].T
        return out, states


@dataclass(frozen=True)
class GatingTrial:
    """The gates of some tokens."""

    tokens: int
    heads: int
    dtype: torch.dtype
    on: torch.device
    seed: int
    operator: str = gating.OPERATOR

    @property
    def device(self) -> str:
        """The device type of its tensors."""
        return str(self.on.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""
        a, b, A_log, dt_bias = self._inputs()
        g = torch.empty(a.shape, dtype=torch.float32, device=self.on)
        call = gating.GatingCall(a, b, A_log, dt_bias, g, torch.empty_like(g), 1.0, 20.0)
        return [i for i in dispatch.candidates(self.operator, self.device) if i.supports(call)[0]]

    def judged(self) -> Verdict:
        """Run it: the decays and how much is written."""
        given = self._inputs()
        g, beta = fused_gating(*given)
        a, b, A_log, dt_bias = (x.double().cpu() for x in given)
        decay = -A_log.exp() * torch.log1p((a + dt_bias).exp())
        verdict = judge_rms(g[0], decay, torch.float32, "g")
        return verdict.and_also(judge_rms(beta[0], 1 / (1 + (-b).exp()), torch.float32, "beta"))

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def drawn(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(self.on, dtype)

        rows = self.tokens, self.heads
        return drawn(*rows), drawn(*rows), drawn(self.heads, dtype=torch.float32), drawn(self.heads)
