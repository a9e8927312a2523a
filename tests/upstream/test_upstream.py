"""The hosts' own tests end as they do unpatched: what scripts/upstream_tests finds.

Everyday runs take vLLM's tests of RoPE where its source distribution has been fetched; the rest of
them, and vllm-ascend's, are slow.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from _env import CHECKOUT, cache_root
from _upstream_sources import MARKER
from _upstream_suites import SUITES

COMMAND = CHECKOUT / "scripts/upstream_tests"
QUICK = ("vllm", "0.18.0", "rotary")
# One dtype and one head size, in every layout, style and width.
QUICK_TESTS = "test_rotary_embedding and dtype0 and 64"


def run(*arguments: str, seconds: int) -> str:
    done = subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )
    print(done.stdout[-6000:], done.stderr[-6000:], file=sys.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def counted(printed: str) -> tuple[int, int]:
    """Tests that reached our code, and their calls, of the closing line."""
    (found,) = re.findall(r"; (\d+) reached our code by (\d+) calls;", printed)
    return int(found[0]), int(found[1])


def test_vllm_s_tests_of_rope_end_as_they_do_unpatched():
    host, release, area = QUICK
    distribution = SUITES[host][release].distribution
    folder = cache_root() / "upstream" / f"{distribution}-{release}"
    if not (folder / MARKER).exists():
        pytest.skip(
            f"missing: the tests of {distribution} {release} in the cache; "
            f"`scripts/upstream_tests {host}` fetches them"
        )
    chosen = ("--release", release, "--area", area, "--tests", QUICK_TESTS)
    tests, calls = counted(run(host, *chosen, seconds=600))
    assert tests > 20
    assert calls >= tests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "release"), [(host, release) for host in SUITES for release in SUITES[host]]
)
def test_all_tests_near_to_the_patches_end_as_they_do_unpatched(host, release):
    tests, calls = counted(run(host, "--release", release, seconds=5400))
    assert min(tests, calls) > 0
