"""The full product of factors on a GPU, judged in fp64; run by test_rope_cuda.py.

    python tests/kernels/rope_product_cuda.py [--workers N] [--seconds S] [--seed N] [OPERATOR ...]

OPERATOR: rotary_embedding (the product of product.ROTARY, both forms), apply_rotary (that of
product.ANGLES), split_qkv_rmsnorm_rope (samples of product.FUSED: its product is too large). Cases
that compile alike go to one worker, in random order; what --seconds leaves out is said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import secrets
import sys
import time
import traceback
from collections.abc import Iterator
from functools import cache

import fused_judge
import product
import rope_oracle_torch as oracle
import sampled_judge
import torch

from ascend_patch.kernels import dispatch, rope
from ascend_patch.kernels.rope import angles_cases, cases, fused_cases

OPERATORS = ("rotary_embedding", "apply_rotary", "split_qkv_rmsnorm_rope")
FUSED_SAMPLES = 4


def groups(operator: str, seed: int) -> list[list[product.Case]]:
    """Cases by what their kernel is compiled for, but for the number of tokens."""
    if operator == "split_qkv_rmsnorm_rope":
        samples = (product.covering(product.FUSED, seed + n) for n in range(FUSED_SAMPLES))
        return [[case] for sample in samples for case in sample]
    rotary = operator == "rotary_embedding"
    loose = ("tokens", "from_qkv", "positions") if rotary else ("places", "from_qkv", "layout")
    found: dict[tuple, list[product.Case]] = {}
    for case in product.full(product.ROTARY if rotary else product.ANGLES):
        key = tuple(
            case["dtype"] if value == "equal" else value
            for name, value in case.items()
            if name not in loose
        )
        found.setdefault(key, []).append(case)
    return list(found.values())


@cache
def cache_of(rows: int, rotary_dim: int, dtype: str) -> torch.Tensor:
    case = cases.RopeCase(1, 1, 1, rotary_dim, rotary_dim, cache_dtype=dtype, max_position=rows)
    return cases.make_cache(case, "cuda")


def judge_rotary(case: cases.RopeCase, in_place: bool) -> int:
    """The inputs of cases.make_inputs, drawn on the GPU; the number of elements judged."""
    q_heads, k_heads = case.query_heads, case.key_heads or 0
    widths = [n * case.head_size for n in (q_heads, k_heads)]
    dtype = getattr(torch, case.dtype)
    qkv = torch.randn(case.tokens, sum(widths) + widths[1], device="cuda").to(dtype)
    query, key = qkv[:, : widths[0]], qkv[:, widths[0] : sum(widths)]
    if not case.from_qkv:
        query, key = query.contiguous(), key.contiguous()
    cos_sin_cache = cache_of(case.max_position, case.rotary_dim, case.cache_dtype)
    shape = (3, case.tokens) if case.mrope_section and not case.text_only else (case.tokens,)
    lowest = case.max_position - 1 if case.positions == "maximal" else 0
    highest = 4 if case.positions == "repeated" else case.max_position
    positions = torch.randint(lowest, highest, shape, device="cuda")
    positions = positions.to(getattr(torch, case.positions_dtype))
    call = (positions, query, key, cos_sin_cache)
    kept = qkv.clone() if case.tokens < 300 else None
    got = rope.rotary_embedding(*call, **case.options)
    assert kept is None or torch.equal(qkv, kept), "the functional form changed its input"
    section = list(case.mrope_section) if case.mrope_section else None
    phase = oracle.phases(positions, cos_sin_cache, section, case.mrope_interleaved)
    for result, x in zip(got, (query, key), strict=True):
        assert result.is_contiguous()
        oracle.judge(result, x, phase, case.head_size, case.is_neox_style)
    if in_place:
        value = qkv[:, sum(widths) :].clone()
        rope.rotary_embedding_(*call, **case.options)
        assert torch.equal(query, got[0]), "in place differs from functional"
        assert torch.equal(key, got[1]), "in place differs from functional"
        assert torch.equal(qkv[:, sum(widths) :], value), "wrote past the slices"
    return query.numel() + key.numel()


def judge_angles(case: angles_cases.AnglesCase) -> int:
    batch = () if case.batch is None else (case.batch,)
    shape = (*batch, case.places, *((3,) * case.from_qkv), case.heads, case.head_size)
    x = torch.randn(shape, device="cuda").to(getattr(torch, case.dtype))
    x = x.select(-3, 1) if case.from_qkv else x
    entries = batch if case.per_entry else ()
    angles = 3 * torch.randn(*entries, case.places, case.rotary_dim // 2, device="cuda")
    cos, sin = (a.to(getattr(torch, case.angles_dtype)) for a in (angles.cos(), angles.sin()))
    got = rope.apply_rotary(x, cos, sin, is_neox_style=case.is_neox_style)
    assert got.is_contiguous()
    phase = torch.complex(cos.double(), sin.double()).expand(*batch, *cos.shape[-2:])
    phase = phase.reshape(-1, cos.shape[-1]) if x.numel() else phase.flatten(0, -2)
    flat = (t.reshape(x.shape[:-2].numel(), case.heads * case.head_size) for t in (got, x))
    oracle.judge(*flat, phase, case.head_size, case.is_neox_style)
    return x.numel()


def judge_fused(case: fused_cases.FusedCase, seed: int) -> int:
    long = case.rope.tokens > sampled_judge.LONG
    (sampled_judge.fused if long else fused_judge.run_and_judge)(case, seed, "cuda")
    return case.rope.tokens * case.rope.query_heads * case.rope.head_size


def judge_group(task: tuple[str, int, list[product.Case], int]) -> tuple[int, int, list[str]]:
    """(cases, elements, what was wrong) of one group; a worker's whole job."""
    operator, number, group, seed = task
    torch.manual_seed(seed + number)
    elements, wrong = 0, []
    for n, factors in enumerate(group):
        try:
            if operator == "rotary_embedding":
                case = product.rotary_case(factors)
                whole = case.rotary_dim == case.head_size
                # What does not turn makes the form in place a kernel of its own: every fourth.
                elements += judge_rotary(case, in_place=whole or number % 4 == 0)
            elif operator == "apply_rotary":
                case = product.angles_case(factors)
                elements += judge_angles(case)
            else:
                case = product.fused_case(factors)
                elements += judge_fused(case, seed + number + n)
        except Exception:
            wrong.append(f"{operator} {case} seed {seed}: {traceback.format_exc(limit=-2)[-800:]}")
    return len(group), elements, wrong


def start() -> None:
    """In each worker: poisoned memory, and a kernel rather than the reference."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for operator in OPERATORS:
        first = dispatch.candidates(operator, "cuda")[0]
        assert first.name == "triton", f"{operator} is served by {first.name}"


def results(arguments: argparse.Namespace) -> Iterator[tuple[int, int, list[str]]]:
    """Of each group, as it comes, until the time is over."""
    tasks = []
    for operator in arguments.operators or OPERATORS:
        found = enumerate(groups(operator, arguments.seed))
        tasks += [(operator, number, group, arguments.seed) for number, group in found]
    random.Random(arguments.seed).shuffle(tasks)
    total, done, begin = len(tasks), 0, time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, start) as pool:
        for found in pool.imap_unordered(judge_group, tasks, chunksize=1):
            done += 1
            yield found
            if time.monotonic() - begin > arguments.seconds:
                break
        pool.terminate()
    print(f"{done} of {total} groups in {time.monotonic() - begin:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", choices=[[], *OPERATORS], default=[])
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()
    print(f"repeat with --seed {arguments.seed}", flush=True)
    count = elements = 0
    wrong: list[str] = []
    for cases_done, elements_done, errors in results(arguments):
        count, elements = count + cases_done, elements + elements_done
        wrong += errors
    print(f"{count} cases, {elements / 1e9:.1f} thousand million elements, {len(wrong)} wrong")
    print("\n".join(wrong[:10]))
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
