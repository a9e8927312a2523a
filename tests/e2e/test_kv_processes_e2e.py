"""KV transfers between real processes over Mooncake's TCP: each ratio, and what goes wrong.

vLLM's connector, its messages, our patch and the engine are real; there is no model, so that all
ratios take seconds, and bytes are compared with what decode would have computed. Servers that
answer requests are test_kv_e2e's.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import _disaggregated
import pytest

RUN = Path(__file__).with_name("kv_process_ranks.py")
RATIOS = ((2, 1), (1, 2), (1, 1), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4))
LAYOUTS, HEADS = ("HND", "NHD"), (4, 2, 1)
# After which a prefill rank frees what nobody fetched.
EXPIRE_S = 5
STORM, MANY = 20, 200
SECONDS = 60


def setup(prefill: int, decode: int, layout: str, heads: int) -> dict[str, Any]:
    return {"prefill_tp": prefill, "decode_tp": decode, "layout": layout, "heads": heads}


SETUPS = [setup(*sizes, *rest) for sizes, *rest in itertools.product(RATIOS, LAYOUTS, HEADS)]
# Sizes that are no powers of two.
SETUPS += [setup(3, 1, "NHD", 6), setup(1, 3, "NHD", 6), setup(6, 3, "HND", 6)]
DOWN, UP = (setup(*sizes, "NHD", 4) for sizes in ((2, 1), (1, 2)))


def name(one: dict[str, Any]) -> str:
    return "{prefill_tp}-{decode_tp}-{layout}-{heads}".format(**one)


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory) -> Any:
    python = lab.python
    here = tmp_path_factory.mktemp("kv-processes")
    paths = [python.drop_in, str(_disaggregated.engine_folder(python.plain))]
    env = os.environ | {
        "LD_PRELOAD": python.preload,
        "PYTHONPATH": ":".join(path for path in paths if path),
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(EXPIRE_S),
    }

    def ask(*asked: tuple[str, dict[str, Any]], seconds: float = 300) -> list[Any]:
        done = subprocess.run(
            [str(python.patched), str(RUN), json.dumps(asked)],
            cwd=here,
            env=env,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture(scope="module")
def every_day(run) -> dict[str, Any]:
    """What is seen each day, of processes that are started once."""
    names = ["ratios", "storm down", "storm up", "killed"]
    found = run(
        ("ratios", {"setups": SETUPS, "together": 4}),
        ("storm", {"setup": DOWN | {"timeout": 20}, "count": STORM}),
        ("storm", {"setup": UP | {"timeout": 20}, "count": STORM}),
        ("killed", {"setup": DOWN | {"timeout": 20}}),
    )
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("number", range(len(SETUPS)), ids=map(name, SETUPS))
def test_decode_holds_what_it_would_have_computed(every_day, number, measured) -> None:
    one, asked = every_day["ratios"][number], SETUPS[number]
    measured.append(f"{name(asked)} between processes: {one['seconds']:.2f} s for 9 requests")
    assert one["right"] == [True] * 9
    assert one["untouched"] == [True] * 5
    assert one["invalid"] == []
    # The control: with one head there is nothing to swap.
    held = asked["heads"] // asked["prefill_tp"]
    assert one["swapped_right"] is (held <= 1)


def check(storm: dict[str, Any], count: int) -> None:
    assert (storm["wrong"], storm["late_writes"], storm["leaked"]) == (0, False, [0, 0])
    assert storm["right"] + storm["failed"] + storm["given_up"] == count
    assert storm["right"] >= count // 2
    assert storm["slowest"] < SECONDS


@pytest.mark.parametrize("direction", ["down", "up"])
def test_requests_under_faults_are_right_or_fail(every_day, direction, measured) -> None:
    storm = every_day[f"storm {direction}"]
    measured.append(f"{STORM} requests under faults between processes, {direction}: {storm}")
    check(storm, STORM)


def test_a_prefill_that_is_killed_while_it_writes_is_noticed(every_day, measured) -> None:
    seen = every_day["killed"]
    measured.append(f"prefill killed while it wrote: failed after {seen['failed_after']:.1f} s")
    assert seen["invalid"] == [4, 5, 6]
    assert seen["failed_after"] < SECONDS / 2
    assert seen["restarted_right"]
    assert not seen["late_writes"]


def test_a_decode_that_is_killed_while_it_is_written_to_costs_prefill_nothing(
    every_day, measured
) -> None:
    seen = every_day["killed"]
    measured.append(f"decode killed: prefill's blocks free after {seen['freed_after']:.1f} s")
    assert seen["freed_after"] < EXPIRE_S + SECONDS / 2
    assert seen["another_right"]


@pytest.mark.slow
def test_two_hundred_requests_under_faults(run, measured) -> None:
    asked = [DOWN, UP, setup(2, 2, "HND", 4)]
    given = [("storm", {"setup": one | {"timeout": 20}, "count": MANY}) for one in asked]
    for one, storm in zip(asked, run(*given, seconds=900), strict=True):
        measured.append(f"{name(one)}, {MANY} requests under faults between processes: {storm}")
        check(storm, MANY)


@pytest.mark.slow
def test_sixteen_requests_at_once(run, measured) -> None:
    (found,) = run(("ratios", {"setups": SETUPS, "together": 16}))
    measured.append(f"16 at once, {len(SETUPS)} ratios: {sum(x['seconds'] for x in found):.1f} s")
    assert all(one["right"] == [True] * 21 and one["invalid"] == [] for one in found)
