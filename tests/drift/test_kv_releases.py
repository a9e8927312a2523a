"""What patch_kv_connector decides on each release of vLLM, from its unpacked source.

And 0.19 to 0.29's own plan of a push: what it leaves out, and ours around it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import drift_sources
import pytest
from packaging.version import Version

from ascend_patch import _plan, _registry
from ascend_patch._versions import Installed
from ascend_patch.impl import kv_vllm_shares
from ascend_patch.patches import _kv_vllm

FUNCTIONS = ("_get_tp_ratio", "_compute_sender_transfer_plan")
RELEASES = next(band.releases for band in _kv_vllm.BANDS if band.targets is _kv_vllm.SHARES)
PLANS = [pytest.param(one, marks=drift_sources.marks("vllm", one)) for one in RELEASES]
HEAD = 256


# The first release of each: there is no connector, sizes are refused, moved, mended, retired.
FROM = {
    "0.11": ("skipped", None),
    "0.13": ("armed", _kv_vllm.REFUSES),
    "0.16": ("armed", _kv_vllm.PUSHES),
    "0.19": ("armed", _kv_vllm.SHARES),
    "0.30": ("retired", ()),
}


@pytest.mark.parametrize("release", drift_sources.releases("vllm"))
def test_each_release_is_in_the_band_that_was_written_for_it(release: str) -> None:
    version = Version(release)
    state, targets = next(
        FROM[first] for first in reversed(FROM) if version.release[:2] >= Version(first).release
    )
    root = drift_sources.root_of("vllm", release)
    installed = Installed({"vllm": release}, {"vllm": root}, "vllm")
    found = _plan.decide(_registry.load()["kv_connector"], installed)
    assert found.state == state, found.reason
    assert (found.band.targets if found.band else None) == targets


def plan_of(release: str) -> Callable[..., tuple[bool, int, int, int]]:
    """The release's function, which needs nothing else of its module."""
    module = _kv_vllm.MOONCAKE.replace(".", "/")
    path = drift_sources.root_of("vllm", release) / f"{module}.py"
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in FUNCTIONS]
    found: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), found)
    plan: Callable[..., tuple[bool, int, int, int]] = found["_compute_sender_transfer_plan"]
    return plan


@pytest.mark.parametrize("release", PLANS)
def test_prefill_tp_4_of_two_heads_fills_decode_tp_1(release) -> None:
    theirs = plan_of(release)

    def given(rank: int) -> tuple[Any, ...]:
        return rank, 4, 0, 1, HEAD, 2 * HEAD, True

    # Ranks 0 and 1 hold head 0, ranks 2 and 3 head 1.
    assert [theirs(*given(rank)) for rank in range(4) if theirs(*given(rank))[0]] == [
        (True, 0, 0, HEAD)
    ]
    ours = [kv_vllm_shares.sender_transfer_plan(theirs, None, given(r), {}) for r in range(4)]
    assert [one for one in ours if one[0]] == [(True, 0, 0, HEAD), (True, 0, HEAD, HEAD)]
    assert [one[0] for one in ours] == [True, False, True, False]


@pytest.mark.parametrize("release", PLANS)
def test_what_the_release_does_right_stays_as_it_is(release) -> None:
    theirs = plan_of(release)
    cases = (
        (1, 2, 0, 1, HEAD, 2 * HEAD, False),
        (0, 1, 1, 2, 2 * HEAD, HEAD, False),
        (1, 2, 1, 2, HEAD, HEAD, True),
        (3, 4, 1, 2, HEAD, HEAD, True),
        (0, 2, 3, 4, HEAD, HEAD, True),
    )
    for case in cases:
        assert kv_vllm_shares.sender_transfer_plan(theirs, None, case, {}) == theirs(*case)
