"""A real vLLM server with patch_rotary gives the logprobs of one without it.

The control is part of the claim: with the kernel's sines negated, in the same server, the same
comparison fails; and a factor on what the kernel returns is visible, so the kernel is what the
model runs, in compiled graphs too.
"""

from __future__ import annotations

from dataclasses import replace

import images
import logprobs
import pytest
from _env import NEWEST
from _tiny_weights import LAYERS, ORIGINAL_POSITIONS, VISION_DEPTH
from server import Lab, Observed, Setup

FLOAT32_TOLERANCE = 1e-4
BFLOAT16_ULPS = 2
# In bfloat16 Qwen2.5-VL's logits are up to 0.1 (3 ulp) from those of float32, patched or not: two
# that round at different places may be twice that apart. YaRN's factor on cosines and sines does
# the same to a lesser degree. Which is nearer to float32 is a test of its own.
ULPS = {"qwen2.5-vl": 8, "qwen3-yarn": 3}
# How much more than the tolerance a wrong RoPE must show, for the comparison to mean anything.
POWER = 10

# Either of them turns queries and keys, once in each layer of a text model.
TEXT_KERNELS = ("ascend_patch::rotary_embedding", "ascend_patch::split_qkv_rmsnorm_rope")
# On a CPU the fused form hands over to the layers that it is made of.
PASSES_ON = "Attention.forward"
VISION_KERNEL = "ascend_patch::apply_rotary"

MODES = {
    "float32": Setup(),
    "bfloat16": Setup(dtype="bfloat16", raw_logits=True),
    "float32-compiled": Setup(compiled=True),
    "bfloat16-compiled": Setup(dtype="bfloat16", raw_logits=True, compiled=True),
    "float32-tp2": Setup(tensor_parallel=2),
    "bfloat16-tp2": Setup(dtype="bfloat16", raw_logits=True, tensor_parallel=2),
}
EAGER = MODES["float32"]
YARN = replace(EAGER, model="qwen3-yarn")
VISION = "qwen2.5-vl"


def setups(modes: str, *, slow: bool = False, **options: str) -> list:
    """Return parameters: a set-up for each of the modes, with a model or a release."""
    marks = [pytest.mark.slow] if slow else []
    return [
        pytest.param(
            replace(MODES[mode], **options), id="-".join([*options.values(), mode]), marks=marks
        )
        for mode in modes.split()
    ]


MODELS = [
    *setups("float32 bfloat16 float32-compiled float32-tp2"),
    *setups("bfloat16-compiled bfloat16-tp2", slow=True),
    *setups("float32", release=NEWEST),
    *setups("bfloat16 float32-compiled bfloat16-compiled float32-tp2", slow=True, release=NEWEST),
    *(
        setup
        for model in ("qwen3-yarn", "glm4", VISION)
        for setup in (
            *setups("float32", model=model),
            *setups("bfloat16 float32-compiled bfloat16-compiled", slow=True, model=model),
            *setups("float32 bfloat16 float32-compiled", slow=True, model=model, release=NEWEST),
        )
    ),
]
SETUPS = pytest.mark.parametrize("setup", MODELS)


def tolerance(setup: Setup, unpatched: Observed, ulps: int = BFLOAT16_ULPS) -> float:
    if setup.dtype == "float32":
        return FLOAT32_TOLERANCE
    return ulps * logprobs.bfloat16_ulp(logprobs.largest(unpatched.answers))


@SETUPS
def test_a_patched_server_gives_the_same_logprobs(
    lab: Lab, setup: Setup, measured: list[str]
) -> None:
    unpatched, patched = lab.unpatched(setup), lab.patched(setup)
    limit = tolerance(setup, unpatched, ULPS.get(setup.model, BFLOAT16_ULPS))
    found = logprobs.compare(unpatched.answers, patched.answers)
    texts = unpatched.answers[: len(setup.prompts)]
    together = logprobs.compare(*logprobs.until_parted(texts, patched.together))
    measured.append(
        f"{setup.name()}: {found.worst:.2e} apart, limit {limit:.2e}, "
        f"{found.diverged} other choices; "
        f"in one batch {together.worst:.2e}; "
        f"started in {unpatched.started_in:.0f} s, patched {patched.started_in:.0f} s"
    )
    assert found.worst <= limit, found
    assert found.unlike == 0, found
    if setup.dtype == "float32":
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
    found = logprobs.compare(logprobs.heads(unpatched.answers), patched.faulty[fault])
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
    assert {p["versions"]["vllm"] for p in processes} == {setup.release}
    states = {p["pid"]: {q["id"]: q["state"] for q in p["patches"]} for p in processes}
    assert not [s for s in states.values() if "failed" in s.values()], states
    assert not [p["problems"] for p in processes if p["problems"]]

    # Only the processes that run the model, one for each rank, and each of them the same calls.
    kernels = {p["pid"]: p["kernels"] for p in processes if p["kernels"]}
    assert len(kernels) == setup.tensor_parallel, kernels
    assert all(calls == next(iter(kernels.values())) for calls in kernels.values()), kernels
    assert all(states[pid]["rotary"] == "applied" for pid in kernels), states
    for calls in kernels.values():
        # Every forward pass rotates once in each layer.
        turned = sum(calls.get(name, 0) for name in TEXT_KERNELS)
        assert turned % LAYERS == 0, calls
        assert turned >= LAYERS * len(setup.prompts) * logprobs.STEPS, calls
        seen = calls.get(VISION_KERNEL, 0)
        assert seen % VISION_DEPTH == 0, calls
        assert seen >= VISION_DEPTH * len(images.QUESTIONS) * setup.images, calls

    # Eager servers count at the target too; a compiled graph has the target's body inside it.
    if not setup.compiled:
        for process in processes:
            rotary = [q for q in process["patches"] if q["id"] == "rotary"]
            targets = [t for q in rotary for t in q["targets"]]
            calls = sum(t["calls"] for t in targets if not t["id"].endswith(PASSES_ON))
            assert calls == sum(process["kernels"].values()), process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "fault"),
    [
        pytest.param(
            replace(MODES[mode], model=model, release=release),
            fault,
            id=f"{model}-{release}-{mode}",
        )
        for model, fault in ((VISION, "mrope-sine"), ("qwen3-yarn", "sine"))
        for release in (EAGER.release, NEWEST)
        for mode in ("bfloat16", "bfloat16-compiled")
    ],
)
def test_bfloat16_is_as_near_to_float32(
    lab: Lab, setup: Setup, fault: str, measured: list[str]
) -> None:
    """Ours rounds less, so it must not be the one of the two that is further away."""
    exact = lab.unpatched(replace(setup, dtype="float32")).answers
    plain, patched = lab.unpatched(setup), lab.patched(setup)
    # The first step alone: behind it the servers may talk about different texts.
    far = {
        name: logprobs.root_mean_square(logprobs.heads(exact, 1), logprobs.heads(answers, 1))
        for name, answers in (("unpatched", plain.answers), ("patched", patched.answers))
    }
    wrong = patched.faulty[fault]
    far["wrong"] = logprobs.root_mean_square(logprobs.heads(exact, 1), logprobs.heads(wrong, 1))
    measured.append(
        f"{setup.name()}, from float32: "
        + ", ".join(f"{name} {distance:.4f}" for name, distance in far.items())
    )
    assert far["patched"] <= 1.1 * far["unpatched"], far
    assert far["wrong"] > POWER * far["unpatched"], far


def test_an_unpatched_server_agrees_with_itself(lab: Lab, measured: list[str]) -> None:
    """What is left for the patch to explain: a batch against one prompt after the other."""
    unpatched = lab.unpatched(EAGER)
    found = logprobs.compare(*logprobs.until_parted(unpatched.answers, unpatched.together))
    measured.append(f"{EAGER.name()}, unpatched, in one batch: {found.worst:.2e} apart")
    assert found.worst <= FLOAT32_TOLERANCE, found


def test_yarn_differs_from_plain_rope(lab: Lab, measured: list[str]) -> None:
    """The same weights without scaling say something else, within the window and past it."""
    plain, scaled = lab.unpatched(EAGER).answers, lab.unpatched(YARN).answers
    assert all(len(answer.prompt) > ORIGINAL_POSITIONS for answer in scaled[len(plain) :])
    assert len(scaled) > len(plain)
    # The first step alone: behind it the two talk about different texts.
    plain, scaled = (logprobs.heads(answers, 1) for answers in (plain, scaled[: len(plain)]))
    found = logprobs.compare(plain, scaled).prompts
    measured.append(f"{YARN.name()}, without scaling: {min(found):.2f}..{max(found):.2f} apart")
    assert min(found) > POWER * FLOAT32_TOLERANCE, found


@pytest.mark.parametrize(
    ("fault", "texts_too"),
    [("mrope-sine", True), ("mrope-axes", False), ("vision-sine", False)],
)
@pytest.mark.parametrize(
    "setup",
    [*setups("float32", model=VISION), *setups("float32", slow=True, model=VISION, release=NEWEST)],
)
def test_one_wrong_rotation_of_a_vision_model_is_noticed(
    lab: Lab, setup: Setup, fault: str, texts_too: bool, measured: list[str]
) -> None:
    """Text and image rotate by different kernels: a fault of one shows where it is used."""
    unpatched, patched = lab.unpatched(setup), lab.patched(setup)
    found = logprobs.compare(logprobs.heads(unpatched.answers), patched.faulty[fault]).prompts
    count = len(setup.prompts)
    texts, seen = found[:count], found[count:]
    measured.append(
        f"{setup.name()}, {fault}: texts {min(texts):.1e}..{max(texts):.1e} apart, "
        f"images {min(seen):.2f}..{max(seen):.2f}"
    )
    assert min(seen) > POWER * FLOAT32_TOLERANCE, found
    if texts_too:
        assert min(texts) > POWER * FLOAT32_TOLERANCE, found
    else:
        assert max(texts) <= FLOAT32_TOLERANCE, found
