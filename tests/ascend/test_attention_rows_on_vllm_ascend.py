"""Every row of what four releases decide, through the releases' own code, unpatched and patched.

`kernels/attention/releases.json` says what was read in their sources; here it is run.
"""

from __future__ import annotations

import functools

import pytest
from ascend_attention_cases import ELSEWHERE, of_example
from ascend_attention_runs import run, session_seed

from ascend_patch.kernels.attention.releases import RELEASES, behaviours
from ascend_patch.kernels.attention.route import route

pytestmark = pytest.mark.slow

ALL = """
import contextlib

@contextlib.contextmanager
def paged(wanted):
    'As if the step were in the list of sizes that paged attention is better at.'
    if not wanted:
        yield
        return
    before, module.using_paged_attention = module.using_paged_attention, lambda *_: True
    yield
    module.using_paged_attention = before

found = {}
for name, case in STEPS.items():
    with paged(name == "paged attention"):
        found[name] = ascend_attention.report(case, SEED)
print(json.dumps([found, router()]))
"""

# What is wrong or fails by the table, and is left to the release; see the patch's `untouched`.
LEFT = {
    ("0.11.0", "cross attention"),
    ("0.13.0", "wide heads"),
    ("0.18.0", "wide heads"),
    ("0.23.0", "wide heads"),
    ("0.23.0", "wide window"),
    ("0.23.0", "not causal window"),
}
ROWS = [
    (release, behaviour)
    for release in RELEASES
    for behaviour in behaviours()
    if release in behaviour.releases and behaviour.name not in ELSEWHERE
]
UNLIMITED = 2147483647


@functools.cache
def reports(release: str, patches: str) -> dict[str, dict]:
    steps = {b.name: of_example(dict(b.example)) for r, b in ROWS if r == release}
    found, state = run(release, f"STEPS = {steps!r}\n{ALL}", patches=patches)
    assert state["state"] == ("off" if patches == "none" else "applied"), state
    return found


@pytest.mark.parametrize(
    ("release", "behaviour"), ROWS, ids=[f"{release}-{b.name}" for release, b in ROWS]
)
def test_row(release, behaviour):
    print(f"repeat with ASCEND_PATCH_SEED={session_seed()}")
    unpatched, patched = (reports(release, p)[behaviour.name] for p in ("none", "attention_router"))
    print(behaviour, unpatched, patched, sep="\n")
    right = 0.02 if behaviour.case.sinks else 1e-4
    if (release, behaviour.name) in LEFT:
        assert unpatched["fault"] or unpatched["error"] > right
        for what in ("fault", "error", "bits"):
            assert patched.get(what) == unpatched.get(what)
    elif behaviour.name == "wide chunk":
        # Right, if slow; here it is only seen that its loop would run.
        assert unpatched["calls"][0]["operator"] == "vanilla_chunked_prefill"
        assert patched["error"] < right
    elif behaviour.verdict in ("same", "reported wrong"):
        assert unpatched["error"] < right
        assert patched == unpatched
    else:
        assert unpatched["fault"] or unpatched["error"] > 2 * right
        assert bool(unpatched["fault"]) or behaviour.verdict != "fails"
        assert patched["error"] < right
        is_the_route_s(patched["calls"], behaviour.case)


def is_the_route_s(calls: list[dict], case) -> None:
    found = route(case)
    assert found.row
    for call in calls:
        assert call["operator"] == found.operator
        assert (call["layout"], call["mode"]) == (found.layout, found.sparse_mode)
        assert call["mask"] == found.mask
        assert call["before"] == (UNLIMITED if found.pre_tokens is None else found.pre_tokens)
        assert call["paged"] == (found.cache == "paged")


def test_each_row_is_here_or_elsewhere():
    named = {b.name for b in behaviours()}
    assert set(ELSEWHERE) <= named
    assert {b.name for _, b in ROWS} | set(ELSEWHERE) == named
    assert not LEFT - {(release, b.name) for release, b in ROWS}
