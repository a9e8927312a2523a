"""patch_gdn_attn's build on the real builders of vLLM's releases, and the tables it attaches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gdn_releases
import pytest


@pytest.fixture(params=gdn_releases.PARAMETERS)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cases(release: str, seed: int) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = gdn_releases.ran("gdn_builders.py", release, seed)["cases"]
    return cases


def test_build_is_the_release_s_without_its_waits(
    release: str, cases: list[dict[str, Any]]
) -> None:
    stock, ours = Counter[str](), Counter[str]()
    for case in cases:
        stock.update(case["stock"])
        ours.update(case["waits"])
    print(f"vllm {release}: waits in {len(cases)} builds: stock {dict(stock)}, ours {dict(ours)}")
    assert not ours
    # The control: the same count sees what the release does.
    assert stock["mask"] > 0
    # 0.17 refuses drafts and decode in one batch; ours makes prefill of decode, as 0.18 does.
    refused = [case for case in cases if case["refused"]]
    assert bool(refused) == release.startswith("0.17.")
    for case in refused:
        assert case["refused"].startswith("AssertionError: num_decodes")
        assert case["prefills"]
        assert case["speculative"]
        assert not case["decodes"]
    wrong = {c["name"]: c["differs"] for c in cases if c["differs"] and not c["refused"]}
    assert not wrong
    tables = {case["name"]: case["tables"] for case in cases if case["tables"]}
    assert not tables
    # What was asked of: batches of every kind.
    kinds = {(bool(c["prefills"]), bool(c["decodes"]), bool(c["speculative"])) for c in cases}
    assert {(True, False, False), (False, True, False), (False, False, True)} <= kinds
    assert {(True, False, True), (True, True, False)} <= kinds


def test_a_request_that_begins_in_decode_finds_its_slot_empty(
    release: str, cases: list[dict[str, Any]]
) -> None:
    built = [case for case in cases if "emptied" in case]
    for case in built:
        # Those that count as prefill are known to begin by `has_initial_state`.
        slots = case["begin"] if case["decodes"] else []
        expected = {"layer": [slots, slots], "another group's": [[], []]}
        assert case["emptied"] == expected, case["name"]
    begins = [case for case in built if any(case["emptied"]["layer"])]
    print(f"vllm {release}: {len(begins)} of {len(built)} batches with requests that begin")
    assert len(begins) >= 3
    # What is to be mended is there.
    assert not any(any(case["stock emptied"]["layer"]) for case in begins)
