"""A real vLLM server with patch_rotary gives the logprobs of one without it.

The control is part of the claim: with the kernel's sines negated, in the same server, the same
comparison fails; and a factor on what the kernel returns is visible, so the kernel is what the
model runs, in compiled graphs too.
"""

from __future__ import annotations

import logprobs
import pytest
from _tiny_model import LAYERS
from server import Lab, Observed, Setup

FLOAT32_TOLERANCE = 1e-4
BFLOAT16_ULPS = 2
# How much more than the tolerance a wrong RoPE must show, for the comparison to mean anything.
POWER = 10

EAGER = Setup()
BFLOAT16 = Setup(dtype="bfloat16", raw_logits=True)
COMPILED = Setup(compiled=True)
PARALLEL = Setup(tensor_parallel=2)
BFLOAT16_COMPILED = Setup(dtype="bfloat16", raw_logits=True, compiled=True)
BFLOAT16_PARALLEL = Setup(dtype="bfloat16", raw_logits=True, tensor_parallel=2)

SETUPS = pytest.mark.parametrize(
    "setup",
    [
        pytest.param(EAGER, id="float32"),
        pytest.param(BFLOAT16, id="bfloat16"),
        pytest.param(COMPILED, id="float32-compiled"),
        pytest.param(PARALLEL, id="float32-tp2"),
        pytest.param(BFLOAT16_COMPILED, id="bfloat16-compiled", marks=pytest.mark.slow),
        pytest.param(BFLOAT16_PARALLEL, id="bfloat16-tp2", marks=pytest.mark.slow),
    ],
)


def tolerance(setup: Setup, unpatched: Observed) -> float:
    if setup.dtype == "float32":
        return FLOAT32_TOLERANCE
    return BFLOAT16_ULPS * logprobs.bfloat16_ulp(logprobs.largest(unpatched.answers))


@SETUPS
def test_a_patched_server_gives_the_same_logprobs(
    lab: Lab, setup: Setup, measured: list[str]
) -> None:
    unpatched, patched = lab.unpatched(setup), lab.patched(setup)
    limit = tolerance(setup, unpatched)
    found = logprobs.compare(unpatched.answers, patched.answers)
    together = logprobs.compare(unpatched.answers, patched.together)
    measured.append(
        f"{setup.name()}: {found.worst:.2e} apart, limit {limit:.2e}, "
        f"{found.diverged} other choices; "
        f"in one batch {together.worst:.2e}; "
        f"started in {unpatched.started_in:.0f} s, patched {patched.started_in:.0f} s"
    )
    assert found.worst <= limit, found
    assert found.unlike == 0, found
    if setup.dtype == "float32":
        assert [a.tokens for a in patched.answers] == [a.tokens for a in unpatched.answers]
        # Prefill of some requests beside decode of others: positions of many in one call.
        assert together.worst <= limit, together


@SETUPS
def test_the_prompts_do_not_collapse(lab: Lab, setup: Setup) -> None:
    """Repeating one token needs no positions; such an answer would prove nothing."""
    assert logprobs.fewest_distinct(lab.unpatched(setup).answers) >= 4


@SETUPS
@pytest.mark.parametrize("fault", ["sine", "factor"])
def test_a_wrong_kernel_is_noticed(lab: Lab, setup: Setup, fault: str, measured: list[str]) -> None:
    unpatched, patched = lab.unpatched(setup), lab.patched(setup)
    limit = tolerance(setup, unpatched)
    found = logprobs.compare(unpatched.answers, patched.faulty[fault])
    measured.append(
        f"{setup.name()}, wrong {fault}: {min(found.prompts):.2f}..{found.worst:.2f} apart"
    )
    # Each prompt on its own: one that a wrong RoPE passes unseen should not be in the list.
    assert min(found.prompts) > POWER * limit, found


@SETUPS
def test_the_status_tells_which_process_ran_the_kernel(lab: Lab, setup: Setup) -> None:
    run = lab.patched(setup).status
    processes = run["processes"]
    assert run["alive"]
    assert {p["host"] for p in processes} == {"vllm"}
    assert {p["versions"]["vllm"] for p in processes} == {"0.18.0"}
    states = {p["pid"]: {q["id"]: q["state"] for q in p["patches"]} for p in processes}
    assert not [s for s in states.values() if "failed" in s.values()], states
    assert not [p["problems"] for p in processes if p["problems"]]

    kernels = {p["pid"]: p["kernels"].get("ascend_patch::rotary_embedding", 0) for p in processes}
    served = {pid: calls for pid, calls in kernels.items() if calls}
    # Only the processes that run the model, one for each rank, and each of them the same calls:
    # every forward pass rotates once in each layer.
    assert len(served) == setup.tensor_parallel, kernels
    assert len(set(served.values())) == 1, kernels
    assert all(states[pid]["rotary"] == "applied" for pid in served), states
    assert all(calls % LAYERS == 0 for calls in served.values()), kernels
    steps = len(logprobs.PROMPTS) * logprobs.STEPS
    assert min(served.values()) >= LAYERS * steps, kernels

    # Eager servers count at the target too; a compiled graph has the target's body inside it.
    if not setup.compiled:
        targets = {
            p["pid"]: sum(t["calls"] for q in p["patches"] for t in q["targets"]) for p in processes
        }
        assert {pid: calls for pid, calls in targets.items() if calls} == served


def test_an_unpatched_server_agrees_with_itself(lab: Lab, measured: list[str]) -> None:
    """What is left for the patch to explain: a batch against one prompt after the other."""
    unpatched = lab.unpatched(EAGER)
    found = logprobs.compare(unpatched.answers, unpatched.together)
    measured.append(f"{EAGER.name()}, unpatched, in one batch: {found.worst:.2e} apart")
    assert found.worst <= FLOAT32_TOLERANCE, found
