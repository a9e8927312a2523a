"""patch_gdn_attn's layer seams on the classes of vLLM's releases: which steps are ours."""

from __future__ import annotations

from typing import Any

import gdn_releases
import pytest

# Of float32, over a prompt of 65 tokens and its next chunk.
FLOAT32 = 2e-5


@pytest.fixture(params=gdn_releases.PARAMETERS)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(release: str, seed: int) -> dict[str, Any]:
    return gdn_releases.ran("gdn_layers.py", release, seed)


def version(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def test_prefill_with_tables_is_ours_and_all_else_the_release_s(
    release: str, found: dict[str, Any]
) -> None:
    # By the release's own calculator, K and V being different.
    assert found["layout"] == ("KV" if version(release) < (0, 16) else "VK")
    for kind in ("prompts", "drafts beside prompts"):
        assert found[kind]["who"] == "ours"
        assert found[kind]["error"] < FLOAT32
    assert found["without tables"] == "theirs"
    # A profile run is the release's; ours compiles for what it will see, drafts included.
    assert found["profile"] == "theirs"
    assert found["draws nothing"]
    assert found["compiled by the profile run"] == found["compiled by then"] == 2
    # Nothing is written where a kernel is missing, and the state says so.
    assert found["without kernels"] == "theirs"
    assert found["caches untouched"]
    (note,) = found["notes"]
    assert note.startswith("prefill runs the release's own kernels: causal_conv1d on cpu:")
    if version(release) >= (0, 17):
        assert found["forward_native"] == "ours"
        assert found["forward_cuda"] == "theirs"
    else:
        assert "forward_cuda" not in found
