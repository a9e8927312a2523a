"""A decode step of the gated delta rule on a CUDA device, beside vLLM's: scripts/bench gdn_decode.

Qwen3-Next's heads (16 of keys, 32 of values, K = V = 128) at TP 1, 2, 4 and 8; q, k and v slices of
one row, gates computed in the step. Every kernel is checked against the recurrence in fp64 before
anything is timed. A time is that of one call inside a captured graph, median and 95th percentile of
many replays; calls take turns over so many states that no cache holds them, as the layers of a
model do. `floor` is what a copy of the states takes at the device's own copy bandwidth.

Peers, where this Python has vLLM 0.18.0: `packed`, fused_recurrent_gated_delta_rule_packed_decode;
`sigmoid`, fused_sigmoid_gating_delta_rule_update, which takes speculative steps too, and is given
contiguous q, k and v. `ours KV` is ours on states in the order of vLLM up to 0.15.1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bench_rope import machine, replay, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DEVICE = "cuda"
BATCHES = (1, 32, 256)
RANKS = (1, 2, 4, 8)
KEY_HEADS, VALUE_HEADS, SIZE = 16, 32, 128
# More than twice the second-level cache of any device so far.
FOOTPRINT = 192 << 20
DRAFTED = 4
# Of a relative error: vLLM's packed step rounds beta to bfloat16, and all round their results.
LIMIT = 6e-3
COLUMNS = ("tp", "batch", "state", "tokens", "what", "p50_us", "p95_us", "bytes", "gb_s")
COLUMNS += ("floor_us", "error")
TILES = tuple(itertools.product((4, 8, 16, 32, 64, 128), (1, 2, 4)))


@dataclass
class Step:
    """One step: tensors, and the sets of slots that calls take turns over."""

    mixed: Any
    a: Any
    b: Any
    A_log: Any
    dt_bias: Any
    cache: Any
    turns: list[Any]
    starts: Any
    accepted: Any

    @property
    def heads(self) -> tuple[int, int]:
        values = self.a.shape[1]
        return values * KEY_HEADS // VALUE_HEADS, values

    def qkv(self) -> tuple[Any, Any, Any]:
        """[1, T, heads, SIZE], slices of the rows."""
        keys, values = self.heads
        widths = [keys * SIZE, keys * SIZE, values * SIZE]
        return tuple(x.unflatten(1, (-1, SIZE))[None] for x in self.mixed.split(widths, 1))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench gdn_decode", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gdn_decode.csv")
    parser.add_argument("--batch", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--tp", type=int, nargs="*", default=RANKS)
    parser.add_argument("--state", nargs="*", default=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, nargs="*", default=(1, DRAFTED), help="a request")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--sweep", action="store_true", help="ours alone, with every tile")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench gdn_decode needs a CUDA device; torch.cuda.is_available() is False.")
        return 1
    from ascend_patch.kernels.gdn import recurrent_triton

    recurrent_triton.register()
    facts = machine(arguments.commit)
    bandwidth = copy_bandwidth(arguments.replays)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="")
    print(f"; a copy moves {bandwidth / 1e9:.0f} GB/s")
    print(",".join(COLUMNS))
    rows = []
    shapes = itertools.product(arguments.tp, arguments.batch, arguments.state, arguments.tokens)
    for ranks, batch, state, tokens in shapes:
        for row in measure(ranks, batch, state, tokens, arguments, bandwidth):
            print(",".join(str(row[column]) for column in COLUMNS), flush=True)
            rows.append(row)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / "gdn_decode.csv", rows, facts, COLUMNS)
    return 0


def copy_bandwidth(replays: int) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    import torch

    source = torch.zeros(1 << 28, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    p50, _ = replay(lambda: target.copy_(source), replays)
    return 2 * source.numel() / (p50 * 1e-6)


def measure(
    ranks: int, batch: int, state: str, tokens: int, options: Any, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """The rows of one shape; all variants share the inputs."""
    step = make_step(ranks, batch, state, tokens)
    moved = state_bytes(step, batch, tokens)
    found = tiled(step) if options.sweep else variants(step, tokens)
    for what, run in found:
        error = check(what, step, run, "KV" if "KV" in what else "VK")
        turn = itertools.cycle(step.turns)
        p50, p95 = replay(lambda run=run, turn=turn: run(step.cache, next(turn)), options.replays)
        row = (ranks, batch, state, tokens, what, round(p50, 3), round(p95, 3), moved)
        row += (round(moved / p50 / 1e3, 1), round(moved / bandwidth * 1e6, 3), f"{error:.1e}")
        yield dict(zip(COLUMNS, row, strict=True))


def state_bytes(step: Step, batch: int, tokens: int) -> int:
    """Bytes of states that a step reads and writes; one is written for each token."""
    size = step.cache[0].numel() * step.cache.element_size()
    return int(batch * (1 + tokens) * size)


def make_step(ranks: int, batch: int, state: str, tokens: int) -> Step:
    import torch

    keys, values = KEY_HEADS // ranks, VALUE_HEADS // ranks
    size = values * SIZE * SIZE * getattr(torch, state).itemsize
    turns = max(1, min(32, FOOTPRINT // (batch * tokens * size)))
    slots = batch * tokens * turns

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=DEVICE)

    indices = torch.randperm(slots, device=DEVICE).int().view(turns, batch, tokens)
    both = normal(batch * tokens, 2 * values).bfloat16()
    return Step(
        mixed=normal(batch * tokens, (2 * keys + values) * SIZE).bfloat16(),
        a=both[:, :values],
        b=both[:, values:],
        A_log=normal(values),
        dt_bias=normal(values).bfloat16(),
        cache=normal(slots, values, SIZE, SIZE).to(getattr(torch, state)),
        turns=[x if tokens > 1 else x[:, 0].contiguous() for x in indices],
        starts=torch.arange(0, batch * tokens + 1, tokens, device=DEVICE).int(),
        accepted=torch.randint(1, tokens + 1, (batch,), device=DEVICE).int(),
    )


Run = Callable[[Any, Any], Any]


def variants(step: Step, tokens: int) -> Iterator[tuple[str, Run]]:
    """(what, a call on a cache and slots that returns o [1, T, HV, V])."""
    yield "ours", ours(step, "VK", tokens)
    yield "ours KV", ours(step, "KV", tokens)
    try:
        from vllm.model_executor.layers.fla.ops import fused_recurrent, fused_sigmoid_gating
    except ImportError as error:
        print(f"no rows of vLLM 0.18.0: {error}", file=sys.stderr)
        return
    import torch

    gates = step.A_log, step.a, step.b, step.dt_bias
    rows, values = step.a.shape
    contiguous = [x.contiguous() for x in step.qkv()]
    out = torch.empty(rows, 1, values, SIZE, dtype=step.mixed.dtype, device=DEVICE)

    def packed(cache: Any, slots: Any) -> Any:
        fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=step.mixed,
            a=step.a,
            b=step.b,
            A_log=step.A_log,
            dt_bias=step.dt_bias,
            scale=SIZE**-0.5,
            initial_state=cache,
            out=out,
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )
        return out.view(1, rows, values, SIZE)

    def sigmoid(cache: Any, slots: Any) -> Any:
        return fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update(
            *gates,
            *contiguous,
            initial_state=cache,
            inplace_final_state=True,
            cu_seqlens=step.starts,
            ssm_state_indices=slots,
            num_accepted_tokens=step.accepted if tokens > 1 else None,
            use_qk_l2norm_in_kernel=True,
        )[0]

    if tokens == 1:
        yield "packed", packed
    yield "sigmoid", sigmoid


def ours(step: Step, layout: str, tokens: int) -> Run:
    from ascend_patch.kernels import dispatch, gdn
    from ascend_patch.kernels.gdn import recurrent_triton

    q, k, v = step.qkv()
    many = {"cu_seqlens": step.starts, "num_accepted_tokens": step.accepted} if tokens > 1 else {}

    def run(cache: Any, slots: Any) -> Any:
        with dispatch.only(recurrent_triton.NAME):
            return gdn.recurrent_gated_delta_rule(
                q,
                k,
                v,
                state=cache,
                state_layout=layout,
                state_indices=slots,
                a=step.a,
                b=step.b,
                A_log=step.A_log,
                dt_bias=step.dt_bias,
                use_qk_l2norm_in_kernel=True,
                **many,
            )

    return run


def tiled(step: Step) -> Iterator[tuple[str, Run]]:
    """Ours in both layouts with each tile of TILES in place of the table's."""
    from ascend_patch.kernels.gdn import recurrent_triton

    tokens = step.turns[0].shape[1] if step.turns[0].dim() == 2 else 1
    table = recurrent_triton.tiles
    try:
        for layout, (columns, warps) in itertools.product(("VK", "KV"), TILES):
            chosen = recurrent_triton.Tiles(columns, warps)
            recurrent_triton.tiles = lambda *_, chosen=chosen: chosen  # type: ignore[assignment]
            yield f"{layout} {columns}x{warps}", ours(step, layout, tokens)
    finally:
        recurrent_triton.tiles = table


def check(what: str, step: Step, run: Run, layout: str) -> float:
    """The larger of the relative errors of outputs and states; ends the program if it is large."""
    slots = step.turns[0]
    wanted, states = recurrence(step, cache := step.cache.clone(), slots, layout)
    found = run(cache, slots)

    def relative(got: Any, want: Any) -> float:
        return float((got.double() - want).norm() / want.norm())

    error = max(relative(found[0], wanted), relative(cache[slots.long().reshape(-1)], states))
    if not error < LIMIT:
        raise SystemExit(f"{what} is off by {error:.1e}: nothing was timed.")
    return error


def recurrence(step: Step, cache: Any, slots: Any, layout: str) -> tuple[Any, Any]:
    """Outputs [T, HV, V] and the states of all slots, in ``layout``, both fp64."""
    import torch

    columns = slots.long().reshape(slots.shape[0], -1)
    count, tokens = columns.shape
    begins = columns[:, 0]
    if tokens > 1:
        begins = columns.gather(1, step.accepted.long()[:, None] - 1)[:, 0]
    state = cache[begins].double()
    state = state if layout == "KV" else state.transpose(-1, -2)
    q, k, v = (x[0].double().unflatten(0, (count, tokens)) for x in step.qkv())
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, 2) for x in (q, k))
    gates = step.a.double() + step.dt_bias.double()
    g = -step.A_log.double().exp() * torch.nn.functional.softplus(gates)
    g, beta = (x.unflatten(0, (count, tokens)) for x in (g, step.b.double().sigmoid()))
    outs, states = [], []
    for token in range(tokens):
        state = state * g[:, token].exp()[..., None, None]
        known = torch.einsum("nhkv,nhk->nhv", state, k[:, token])
        change = beta[:, token, :, None] * (v[:, token] - known)
        state = state + k[:, token, :, :, None] * change[..., None, :]
        outs.append(torch.einsum("nhkv,nhk->nhv", state, q[:, token]) * SIZE**-0.5)
        states.append(state if layout == "KV" else state.transpose(-1, -2))
    return torch.stack(outs, 1).flatten(0, 1), torch.stack(states, 1).flatten(0, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
