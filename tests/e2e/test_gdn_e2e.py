"""vLLM 0.18 serves GDN models on a CPU with patch_gdn_attn, and says what transformers says.

The controls are part of the claim: with the gates closed, or states lost between a prompt's parts,
the same comparison fails in the same servers; and without the shim no server starts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from _env import NEWEST
from _server import ServerError
from _tiny_gdn import LAYER_TYPES
from gdn_servers import ALONE, BATCH, BLOCK, FAULTS, REPEATED_STEPS, Gdn, GdnLab
from gdn_transformers import distance

FLOAT32_TOLERANCE = 1e-3
# How much more than the tolerance a wrong layer must show, for the comparison to mean anything.
POWER = 10
GDN_LAYERS = LAYER_TYPES.count("linear_attention")
PREFILL = ("causal_conv1d", "fused_gating", "chunk_gated_delta_rule")
DECODE = ("causal_conv1d_update", "recurrent_gated_delta_rule")

EAGER = Gdn()
BFLOAT16 = replace(EAGER, dtype="bfloat16")
# Parts of any length; with prefix caching they end where blocks do.
UNCACHED = replace(EAGER, prefix_caching=False, chunk=97)
# Compiled, with the release's own rotary embedding: torch 2.10's C++ for it is not valid.
OWN_ROTARY = replace(EAGER, model="qwen3.5", compiled=True)


def slow(**setups: Gdn) -> list:
    return [
        pytest.param(setup, id=name.replace("_", "-"), marks=pytest.mark.slow)
        for name, setup in setups.items()
    ]


FLOAT32 = [
    pytest.param(replace(EAGER, repeats=20), id="eager"),
    *slow(
        uncached=UNCACHED,
        compiled=replace(EAGER, compiled=True),
        tp2=replace(EAGER, tensor_parallel=2),
        emulated=replace(EAGER, device="emulated"),
        qwen3_5=replace(EAGER, model="qwen3.5"),
        qwen3_5_compiled=replace(OWN_ROTARY, patches="gdn_attn,rotary"),
    ),
]
HALF = [
    pytest.param(BFLOAT16, id="bfloat16"),
    *slow(
        bfloat16_uncached=replace(UNCACHED, dtype="bfloat16"),
        bfloat16_compiled=replace(BFLOAT16, compiled=True),
        bfloat16_emulated=replace(BFLOAT16, device="emulated"),
        bfloat16_qwen3_5=replace(BFLOAT16, model="qwen3.5"),
    ),
]
float32 = pytest.mark.parametrize("setup", FLOAT32)
half = pytest.mark.parametrize("setup", HALF)


@pytest.fixture(scope="session")
def gdn(lab) -> GdnLab:
    return GdnLab(lab)


@float32
def test_tokens_and_logprobs_are_those_of_transformers(gdn, setup, measured) -> None:
    seen, oracle = gdn.patched(setup), gdn.oracle(setup)
    verdicts = [oracle.judge(said) for said in (seen.alone, seen.together, seen.late)]
    far = ", ".join(f"{verdict.worst:.1e}" for verdict in verdicts)
    measured.append(
        f"gdn, {setup.name()}: {far} from transformers (alone, in one batch, late), limit "
        f"{FLOAT32_TOLERANCE:.0e}; nearest choices {min(v.margin for v in verdicts):.1e} apart; "
        f"{seen.hits:.0f} tokens hit; started in {seen.started_in:.0f} s"
    )
    for verdict in verdicts:
        assert verdict.worst <= FLOAT32_TOLERANCE, verdict
        # Choices that are level to within the tolerance would prove nothing.
        assert verdict.margin > FLOAT32_TOLERANCE, verdict
        assert verdict.wrong == 0, verdict
    lengths = [len(answer.prompt) for answer in (*seen.alone, *seen.together)]
    assert {1, 63, 64, 65, 500} <= set(lengths)


@float32
def test_every_token_of_a_prompt_is_read_as_transformers_reads_it(gdn, setup, measured) -> None:
    seen, oracle = gdn.patched(setup), gdn.oracle(setup)
    right = [oracle.read(prompt) for prompt in (*ALONE, *BATCH)]
    far = max(
        abs(a - b)
        for one, other in zip(right, seen.read, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    measured.append(f"gdn, {setup.name()}: prompts' tokens {far:.1e} from transformers")
    assert far <= FLOAT32_TOLERANCE


@float32
def test_again_and_again_the_same_tokens(gdn, setup) -> None:
    """Requests of their own, at once: steps that prefill some and decode others, in any order."""
    seen = gdn.patched(setup)
    assert len(seen.repeats) == setup.repeats
    tokens = {tuple(answer.tokens for answer in answers) for answers in seen.repeats}
    assert tokens == {tuple(answer.tokens[:REPEATED_STEPS] for answer in seen.together)}


@pytest.mark.parametrize("setup", [*FLOAT32, *HALF])
def test_prefixes_come_out_of_the_cache(gdn, setup) -> None:
    seen = gdn.patched(setup)
    assert (seen.hits > 0) == setup.prefix_caching
    # States as well as keys: where only one of the two were kept, nothing would be hit.
    assert seen.hits % BLOCK == 0


@float32
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_noticed(gdn, setup, fault, measured) -> None:
    seen, oracle = gdn.patched(setup), gdn.oracle(setup)
    verdict = oracle.judge(seen.faulty[fault])
    prompts = (*ALONE, *BATCH)
    # A prompt that fits in one part, and follows nothing cached, has no state to lose.
    shows = [
        far
        for far, prompt in zip(verdict.apart, prompts, strict=True)
        if fault == "beta" or len(prompt) > max(setup.chunk, BLOCK)
    ]
    measured.append(f"gdn, {setup.name()}, wrong {fault}: {min(shows):.2f}..{max(shows):.2f} apart")
    assert len(shows) >= 3
    assert min(shows) > POWER * FLOAT32_TOLERANCE, verdict


@half
def test_bfloat16_is_as_near_to_float32_as_transformers(gdn, setup, measured) -> None:
    """Both round to bfloat16, at places of their own; the prompts' tokens are given to both."""
    exact, rounded = gdn.oracle(setup), gdn.oracle(setup, "bfloat16")
    prompts = (*ALONE, *BATCH)
    right = [exact.read(prompt) for prompt in prompts]
    theirs = distance(right, [rounded.read(prompt) for prompt in prompts])
    seen = gdn.patched(setup)
    ours = distance(right, seen.read)
    measured.append(
        f"gdn, {setup.name()}: {ours:.4f} from float32, transformers {theirs:.4f} (root mean "
        f"square over {sum(map(len, right))} tokens); started in {seen.started_in:.0f} s"
    )
    assert ours <= theirs


@pytest.mark.parametrize("setup", [*FLOAT32, *HALF])
def test_the_status_tells_what_ran(gdn, setup) -> None:
    run = gdn.patched(setup).status
    processes = run["processes"]
    assert run["alive"]
    assert not [p["problems"] for p in processes if p["problems"]]
    assert {p["device"] for p in processes} == {setup.device}
    workers = [p for p in processes if p["kernels"]]
    assert len(workers) == setup.tensor_parallel
    for worker in workers:
        states = {patch["id"]: patch for patch in worker["patches"]}
        assert states["gdn_attn"]["state"] == "applied", states
        assert all(target["state"] == "applied" for target in states["gdn_attn"]["targets"])
        calls = worker["kernels"]
        for names in (PREFILL, DECODE):
            counts = {calls.get(name, 0) for name in names}
            assert len(counts) == 1, calls
            assert min(counts) > 0, calls
            assert min(counts) % GDN_LAYERS == 0, calls


@pytest.mark.slow
def test_without_the_shim_no_server_starts(lab) -> None:
    server = lab.server(EAGER, patches=None)
    with pytest.raises(ServerError), server:
        pytest.fail("vLLM serves the model by itself: this release needs the patch no more")
    log = server.log.read_text()
    # The first of the places; what is behind it has not been reached.
    assert "dispatch_cpu_unquantized_gemm" in log
    assert "ValueError: too many values to unpack (expected 2)" in log


@pytest.mark.slow
def test_qwen3_5_compiles_with_our_rotary_embedding_alone(gdn, tmp_path) -> None:
    server = gdn.server(OWN_ROTARY, tmp_path / "no-fault")
    with pytest.raises(ServerError), server:
        pytest.fail("it compiles: the README says that on a CPU it needs `rotary`")
    assert "CppCompileError" in server.log.read_text()


@pytest.mark.slow
def test_the_newest_release_is_left_alone(gdn, measured) -> None:
    """It has the tables, and kernels for a CPU: bfloat16, and K equal to V."""
    setup = replace(BFLOAT16, model="qwen3-next-square", release=NEWEST)
    plain, patched = (gdn.newest(setup, patches) for patches in (None, "gdn_attn"))
    assert patched.alone == plain.alone
    assert patched.together == plain.together
    found = {
        (patch["state"], patch["reason"])
        for process in patched.status["processes"]
        for patch in process["patches"]
        if patch["id"] == "gdn_attn"
    }
    ((state, reason),) = found
    assert state == "retired"
    assert "0.20.0" in reason
    measured.append(f"gdn, {setup.name()}: retired, the same to the last bit")
