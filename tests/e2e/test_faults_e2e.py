"""A patch that breaks in a real server: vLLM serves unpatched and the state says why.

With ASCEND_PATCHES_STRICT=1 the server refuses to start, with the same reason.
"""

from __future__ import annotations

from pathlib import Path

import logprobs
import pytest
from _server import ServerError
from server import Lab, Setup, wait_until

BROKEN_PATCH = Path(__file__).resolve().parent / "broken_patch"
EAGER = Setup()
FAULT = "SystemExit: a fault of the test's own"
REFUSAL_SECONDS = 120


def search_path(lab: Lab, folder: Path) -> str:
    return ":".join(part for part in (str(folder), lab.python.drop_in) if part)


def log_of_refusal(lab: Lab, **variables: str) -> list[str]:
    """Start a server that must end by itself; what it printed."""
    patches = variables.pop("ASCEND_PATCHES", "all")
    server = lab.server(EAGER, patches=patches, ASCEND_PATCHES_STRICT="1", **variables)
    server.start()
    try:
        process = server.process
        assert process is not None
        assert wait_until(lambda: process.poll() is not None, REFUSAL_SECONDS), "it still runs"
        assert process.returncode != 0
        with pytest.raises(ServerError, match="ended with exit code"):
            server.wait_until_ready()
    finally:
        server.stop()
    return server.log.read_text(errors="replace").splitlines()


def test_a_patch_that_breaks_leaves_vllm_as_it_was(lab: Lab) -> None:
    unpatched = lab.unpatched(EAGER)
    path = search_path(lab, BROKEN_PATCH)
    with lab.server(EAGER, patches="all", PYTHONPATH=path) as server:
        answers = logprobs.ask(server, unpatched.answers)
        status = lab.status(server)
    assert [a.tokens for a in answers] == [a.tokens for a in unpatched.answers]
    assert logprobs.compare(unpatched.answers, answers).worst <= 1e-4
    rotary = [q for p in status["processes"] for q in p["patches"] if q["id"] == "rotary"]
    failed = [patch for patch in rotary if patch["state"] == "failed"]
    assert failed, rotary
    for patch in failed:
        assert FAULT in patch["reason"]
        assert patch["reason"].endswith("rolled back, vLLM runs as it was")
        # One target broke; of the others nothing is left.
        assert {t["state"] for t in patch["targets"]} <= {"failed", "reverted"}
    assert not any(p["kernels"] for p in status["processes"])


def test_strict_refuses_what_failed_while_the_model_was_loaded(lab: Lab) -> None:
    log = log_of_refusal(lab, PYTHONPATH=search_path(lab, BROKEN_PATCH))
    refusals = [line for line in log if "ASCEND_PATCHES_STRICT=1 and patch rotary is" in line]
    assert refusals, log[-20:]
    assert FAULT in refusals[0]


def test_strict_refuses_at_once_what_cannot_be_applied(lab: Lab) -> None:
    """Decided before vLLM's code runs: one line, and no traceback. No NPU has gdn_attn's vLLM."""
    wish = {"ASCEND_PATCHES": "rotary,gdn_attn", "ASCEND_PATCHES_DEVICE": "npu"}
    log = log_of_refusal(lab, **wish)
    assert log == [log[0]], log
    assert log[0].startswith("ascend-patch: ASCEND_PATCHES_STRICT=1 and patch gdn_attn is skipped")


def test_an_unknown_name_stops_the_server_with_one_line(lab: Lab) -> None:
    log = log_of_refusal(lab, ASCEND_PATCHES="rotery")
    assert log == [log[0]], log
    assert "Did you mean `rotary`?" in log[0]
