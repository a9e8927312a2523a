"""vLLM's compile cache, shared by servers with and without the shim: each takes only its own."""

from __future__ import annotations

import logprobs
import pytest
from _env import DEFAULT, NEWEST
from server import Lab, Setup

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("release", [DEFAULT, NEWEST])
def test_patched_and_unpatched_servers_share_a_cache_folder(
    lab: Lab, release: str, measured: list[str]
) -> None:
    """A graph of the other kind would leave our kernel out, or call it where it is not known."""
    setup = Setup(compiled=True, release=release)
    cache = {"VLLM_CACHE_ROOT": str(lab.folder / f"vllm-cache-{release}")}
    started = []
    answers = []
    for patches in (None, "all", None):
        with lab.server(setup, patches=patches, **cache) as server:
            answers.append(setup.ask(server, answers[0] if answers else None))
            started.append(f"{server.started_in:.0f}")
            if patches is not None:
                processes = lab.status(server)["processes"]
    kernels = sum(calls for p in processes for calls in p["kernels"].values())
    measured.append(f"{setup.name()}, one cache: started in {', '.join(started)} s")
    assert kernels > len(setup.prompts) * logprobs.STEPS, processes
    for other in answers[1:]:
        assert logprobs.compare(answers[0], other).worst <= 1e-4
