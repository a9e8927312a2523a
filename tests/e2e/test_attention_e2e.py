"""Real vLLM servers on the emulated device: an NPU's routing and operators, held to vLLM's own.

The control is part of the claim: a window that is one key too wide, or embeddings routed as
vllm-ascend 0.13 did, fail the same comparisons in the same servers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import logprobs
import pytest
from _tiny_weights import LAYERS
from attention_servers import (
    FAULTY,
    PROMPTS,
    Attention,
    AttentionLab,
    Seen,
    apart,
    right_vectors,
)

FLOAT32_TOLERANCE = 1e-4
# vLLM's own attention multiplies tiles of bfloat16 where the CPU can, and then rounds in other
# places: 2.5 ulp from the operators' semantics were seen on a Xeon, and 1.5 on an EPYC.
BFLOAT16_ULPS = 3 if "amx_bf16" in Path("/proc/cpuinfo").read_text() else 2
# How much more than the tolerance a wrong route must show, for the comparison to mean anything.
POWER = 10
ATTENTION, WRITE = "npu::npu_fused_infer_attention_score", "atb::_npu_reshape_and_cache"

QWEN = Attention()
WINDOW = Attention(model="llama-window")
BFLOAT16 = {"dtype": "bfloat16", "raw_logits": True}
WHOLE = {"chunked_prefill": False}
EMBEDS = Attention(pooling=True)

GENERATES = [
    pytest.param(replace(QWEN, **BFLOAT16), id="qwen3-bfloat16"),
    pytest.param(WINDOW, id="window-float32"),
    *(
        pytest.param(setup, id=name, marks=pytest.mark.slow)
        for name, setup in {
            "qwen3-float32": QWEN,
            "qwen3-tp2": replace(QWEN, tensor_parallel=2),
            "qwen3-whole": replace(QWEN, **WHOLE),
            "qwen3-compiled": replace(QWEN, compiled=True),
            "qwen3-bfloat16-compiled": replace(QWEN, compiled=True, **BFLOAT16),
            "window-bfloat16": replace(WINDOW, **BFLOAT16),
            "window-whole": replace(WINDOW, **WHOLE),
            "window-compiled": replace(WINDOW, compiled=True),
        }.items()
    ),
]
POOLS = [
    pytest.param(EMBEDS, id="cached-chunked"),
    *(
        pytest.param(replace(EMBEDS, prefix_caching=cached, chunked_prefill=chunked), id=name,
                     marks=pytest.mark.slow)
        for name, cached, chunked in (
            ("cached", True, False), ("chunked", False, True), ("neither", False, False),
        )
    ),
]  # fmt: skip
generates = pytest.mark.parametrize("setup", GENERATES)
pools = pytest.mark.parametrize("setup", POOLS)


@pytest.fixture(scope="session")
def attention(lab) -> AttentionLab:
    return AttentionLab(lab)


def tolerance(setup: Attention, plain: Seen) -> float:
    if setup.dtype == "float32":
        return FLOAT32_TOLERANCE
    return BFLOAT16_ULPS * logprobs.bfloat16_ulp(logprobs.largest(plain.first))


@generates
def test_the_logprobs_are_those_of_vllm_s_own_attention(attention, setup, measured) -> None:
    plain, seen = attention.plain(setup), attention.emulated(setup)
    limit = tolerance(setup, plain)
    found = logprobs.compare(plain.first, seen.first)
    again = logprobs.compare(logprobs.heads(plain.first), seen.again)
    together = logprobs.compare(*logprobs.until_parted(plain.first, seen.together))
    measured.append(
        f"emulated, {setup.name()}: {found.worst:.2e} apart, from the cache {again.worst:.2e}, "
        f"at once {together.worst:.2e}, limit {limit:.2e}; {seen.hits:.0f} tokens hit; "
        f"started in {seen.started_in:.0f} s"
    )
    for one in (found, again, together):
        assert one.worst <= limit, one
        assert one.unlike == 0, one


@generates
def test_the_prompts_do_not_collapse(attention, setup) -> None:
    """Repeating one token needs no context; such an answer would prove nothing."""
    assert logprobs.fewest_distinct(attention.plain(setup).first) >= 4


@pytest.mark.parametrize("setup", [p for p in GENERATES if "window-float32" in p.id])
def test_a_window_that_is_off_by_one_is_noticed(attention, setup, measured) -> None:
    plain, seen = attention.plain(setup), attention.emulated(setup)
    found = logprobs.compare(logprobs.heads(plain.first[FAULTY:]), seen.faulty)
    measured.append(
        f"emulated, {setup.name()}, window off by one: "
        f"{min(found.prompts):.2f}..{found.worst:.2f} apart"
    )
    assert min(found.prompts) > POWER * tolerance(setup, plain), found


@pools
def test_embeddings_are_those_of_transformers(attention, lab, setup, measured) -> None:
    right = right_vectors(lab.model(setup.dtype, setup.model))
    seen = attention.emulated(setup)
    far = [max(apart(right, found)) for found in (seen.first, seen.again, seen.together)]
    measured.append(
        f"emulated, {setup.name()}: {far[0]:.2e} apart, once more {far[1]:.2e}, at once "
        f"{far[2]:.2e}; {seen.hits:.0f} tokens hit"
    )
    assert max(far) <= FLOAT32_TOLERANCE, far


@pytest.mark.parametrize("setup", [p for p in POOLS if p.id != "neither"])
def test_embeddings_that_are_routed_as_they_were_are_noticed(
    attention, lab, setup, measured
) -> None:
    """The fusion operator has this step's keys alone: what is in the cache is lost."""
    right = right_vectors(lab.model(setup.dtype, setup.model))[FAULTY:]
    far = apart(right, attention.emulated(setup).faulty[FAULTY:])
    measured.append(f"emulated, {setup.name()}, old routing: {min(far):.2f}..{max(far):.2f} apart")
    assert min(far) > POWER * FLOAT32_TOLERANCE, far


@pytest.mark.parametrize("setup", [*GENERATES, *POOLS])
def test_what_ran_are_the_operators_of_the_surface(attention, setup) -> None:
    seen = attention.emulated(setup)
    processes = seen.status["processes"]
    assert not [p["problems"] for p in processes if p["problems"]]
    states = {p["pid"]: {q["id"]: q["state"] for q in p["patches"]} for p in processes}
    workers = [p for p in processes if p["kernels"]]
    assert len(workers) == setup.tensor_parallel
    calls = workers[0]["kernels"]
    for worker in workers:
        assert states[worker["pid"]]["attention_router"] == "applied", states
        assert worker["device"] == "emulated"
        assert worker["kernels"] == calls
    # One call a layer in each step, and as many writes; warm-up writes and attends nothing. The
    # prompts were asked one by one twice, and once in as few steps as it took.
    assert calls[ATTENTION] % LAYERS == 0, calls
    assert calls[ATTENTION] > 2 * LAYERS * len(PROMPTS), calls
    assert calls[WRITE] >= calls[ATTENTION], calls
    assert set(calls) == {ATTENTION, WRITE}, calls

    surface = [line for line in seen.log if "operator surface of torch_npu" in line]
    assert len(surface) == len(workers), seen.log
    allowance = [line for line in seen.log if "allowance `float32` is on" in line]
    assert len(allowance) == len(workers) * (setup.dtype == "float32"), seen.log


@pytest.mark.parametrize("setup", [*GENERATES, *POOLS])
def test_batches_were_in_every_state_that_the_server_can_have(attention, setup) -> None:
    """Without prompts in parts, cached prefixes and mixed batches little would have been shown."""
    seen = attention.emulated(setup)
    states = {state.partition(" ")[0] for state in seen.states}
    expected = {"prefill"}
    if not setup.pooling:
        expected.add("decode")
    mixed = not setup.pooling or setup.prefix_caching or setup.chunked_prefill
    if mixed:
        expected.add("chunked" if setup.chunked_prefill else "cache_hit")
    assert expected <= states, seen.states
    rows = {state.partition(" ")[2] for state in seen.states}
    windows = {row for row in rows if "window" in row}
    assert bool(windows) == (setup.model == WINDOW.model), rows
    assert (seen.hits > 0) == setup.prefix_caching, seen.hits


@pytest.mark.slow
def test_layers_of_an_encoder_are_left_to_vllm(attention, measured) -> None:
    """The same weights with every token in sight of every other."""
    setup = replace(EMBEDS, causal=False, prefix_caching=False, chunked_prefill=False)
    plain, seen = attention.plain(setup), attention.emulated(setup)
    assert max(apart(plain.first, seen.first)) <= FLOAT32_TOLERANCE
    assert not [process["kernels"] for process in seen.status["processes"] if process["kernels"]]
    assert len(seen.log) == 1, seen.log
    assert "because encoder_only attention is vLLM's" in seen.log[0]
    # The control: with causal attention they say something else.
    causal = attention.emulated(replace(setup, causal=True)).first
    far = apart(plain.first, causal)
    measured.append(f"emulated, {setup.name()}: {min(far[1:]):.2f} apart from causal attention")
    assert min(far[1:]) > POWER * FLOAT32_TOLERANCE, far
