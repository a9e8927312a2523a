"""VERIFY and the self-test at load, in real servers: right, wrong, and where they cannot look."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _env
import _server
import pytest
from server import Lab, Setup, wait_until

EAGER = Setup()
BFLOAT16 = Setup(dtype="bfloat16", raw_logits=True)
COMPILED = Setup(compiled=True)
NEWEST = Setup(release=_env.NEWEST)
CALLS = 100
REFUSAL_SECONDS = 120
VERIFY, SELFTEST = "ASCEND_PATCHES_VERIFY", "ASCEND_PATCHES_SELFTEST"


@contextmanager
def served(lab: Lab, setup: Setup, fault: str = "", **variables: str) -> Iterator[Any]:
    """A patched server and the file that breaks its kernels; it says so in `fault`."""
    file = lab.folder / "verify-fault"
    file.write_text(fault)
    with lab.server(setup, patches="all", fault=file, **variables) as server:
        yield server, file


def rotary(lab: Lab, server: _server.Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the process that runs the model, its patch_rotary)."""
    found = [
        (process, patch)
        for process in lab.status(server)["processes"]
        for patch in process["patches"]
        if patch["id"] == "rotary" and process.get("model_loaded")
    ]
    assert len(found) == 1, found
    return found[0]


def tokens(answers: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(EAGER, id="float32"),
        pytest.param(BFLOAT16, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(NEWEST, id="newest", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_is_right_says_so_and_how_much(
    lab: Lab, setup: Setup, measured: list[str]
) -> None:
    unpatched = lab.unpatched(setup)
    asked = {VERIFY: f"rotary:{CALLS}", SELFTEST: "1"}
    with served(lab, setup, **asked) as (server, _):
        before, _ = rotary(lab, server)
        answers = setup.ask(server, unpatched.answers)
        process, patch = rotary(lab, server)
        text = server.log.read_text(errors="replace")
    # Nothing is compared while a model is profiled and warmed up.
    assert before["verification"]["rotary"]["compared"] == 0
    found = process["verification"]["rotary"]
    measured.append(
        f"{setup.name()}: {found['compared']} calls compared, largest error {found['error']:.3g} "
        f"{found['unit']} of {found['limit']:g}; self-test: {process['self_tests']['rotary']}"
    )
    assert patch["state"] == "applied", patch["reason"]
    assert found["compared"] == found["calls"] == CALLS
    assert 0 <= found["error"] <= found["limit"]
    # In bfloat16 vLLM's operator rounds once, as ours does.
    assert found["error"] > 0 or setup.dtype == "bfloat16"
    assert found["where"].startswith("vllm.model_executor.layers.rotary_embedding.")
    assert found["notes"] == []
    said = re.fullmatch(
        r"(\d+) cases, 99\.9 % within ([\d.]+) ulp, largest error ([\d.]+) of its limit, \d+ ms",
        process["self_tests"]["rotary"],
    )
    assert said, process["self_tests"]
    assert int(said[1]) >= 4
    assert float(said[2]) <= 1
    assert float(said[3]) <= 1
    assert "WARNING: ASCEND_PATCHES_VERIFY" not in text
    assert not process["problems"]
    if setup.dtype == "float32":
        assert tokens(answers) == tokens(unpatched.answers)


def test_a_kernel_that_goes_wrong_is_switched_off_in_the_same_call(lab: Lab) -> None:
    unpatched = lab.unpatched(EAGER)
    with served(lab, EAGER, **{VERIFY: "all"}) as (server, file):
        assert tokens(EAGER.ask(server, unpatched.answers)) == tokens(unpatched.answers)
        process, patch = rotary(lab, server)
        assert patch["state"] == "applied", patch["reason"]
        compared = process["verification"]["rotary"]["compared"]
        assert compared > CALLS
        file.write_text("sine")
        answers = EAGER.ask(server, unpatched.answers)
        process, patch = rotary(lab, server)
    # The very first wrong call gave what the host's own code gives.
    assert tokens(answers) == tokens(unpatched.answers)
    assert patch["state"] == "failed"
    target = r"vllm\.model_executor\.layers\.rotary_embedding\.base:RotaryEmbedding\.forward_cpu"
    assert re.match(rf"verification: {target}, call {compared + 1}: ", patch["reason"]), patch
    assert "elements are out of bounds, the worst at" in patch["reason"]
    assert patch["reason"].endswith("; the host's own code runs")
    assert {t["state"] for t in patch["targets"] if t["calls"]} == {"reverted"}
    assert process["verification"]["rotary"]["compared"] == compared + 1


def test_without_verify_the_same_fault_is_served(lab: Lab) -> None:
    """The control: what the test above sees is VERIFY's doing."""
    unpatched = lab.unpatched(EAGER)
    with served(lab, EAGER, "sine") as (server, _):
        answers = EAGER.ask(server, unpatched.answers)
        _, patch = rotary(lab, server)
    assert tokens(answers) != tokens(unpatched.answers)
    assert patch["state"] == "applied"


def test_a_kernel_that_is_wrong_at_load_is_never_served(lab: Lab) -> None:
    unpatched = lab.unpatched(EAGER)
    with served(lab, EAGER, "factor", **{SELFTEST: "1"}) as (server, _):
        answers = EAGER.ask(server, unpatched.answers)
        process, patch = rotary(lab, server)
    assert tokens(answers) == tokens(unpatched.answers)
    assert patch["state"] == "failed"
    assert patch["reason"].startswith("self-test: rotary_embedding, RotaryEmbedding, neox, float32")
    assert patch["reason"].endswith("; the host's own code runs")
    assert not process["kernels"]


@pytest.mark.slow
def test_strict_refuses_a_kernel_that_is_wrong_at_load(lab: Lab) -> None:
    file: Path = lab.folder / "verify-fault"
    file.write_text("sine")
    server = lab.server(
        EAGER, patches="all", fault=file, ASCEND_PATCHES_STRICT="1", **{SELFTEST: "1"}
    )
    server.start()
    try:
        process = server.process
        assert process is not None
        assert wait_until(lambda: process.poll() is not None, REFUSAL_SECONDS), "it still runs"
        assert process.returncode != 0
    finally:
        server.stop()
    log = server.log.read_text(errors="replace")
    assert "ASCEND_PATCHES_STRICT=1 and patch rotary is failed: self-test: " in log


@pytest.mark.slow
def test_a_compiled_server_says_what_verify_needs(lab: Lab) -> None:
    unpatched = lab.unpatched(COMPILED)
    with served(lab, COMPILED, **{VERIFY: "rotary"}) as (server, _):
        answers = COMPILED.ask(server, unpatched.answers)
        process, patch = rotary(lab, server)
    assert process["verification"]["rotary"]["compared"] == 0
    assert process["verification"]["rotary"]["notes"] == ["needs --enforce-eager"]
    assert patch["state"] == "applied"
    assert tokens(answers) == tokens(unpatched.answers)
    assert process["kernels"]["ascend_patch::rotary_embedding"] > 0
