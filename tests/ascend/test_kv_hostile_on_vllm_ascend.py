"""MooncakeConnectorV1 of four vllm-ascend releases: hostile peers, random requests, storms.

What each case shows is in `ascend_kv_shown`; the everyday run has the same cases on a stand-in
(`tests/robustness/test_kv_of_vllm_ascend.py`).
"""

from __future__ import annotations

import json
from typing import Any

import ascend_kv_shown as shown
import pytest
from ascend_attention_runs import session_seed
from ascend_case import BRANCHES, START, Host
from ascend_kv_attacker import KINDS
from ascend_kv_runs import BUILT, ENDING, PATCH, once, opening

pytestmark = pytest.mark.slow

RELEASES = ("0.11.0", "0.13.0", "0.18.0", "0.23.0")
each_release = pytest.mark.parametrize("release", RELEASES)
MESSAGES, TRIED, ATTEMPTS = 100_000, 25_000, 5000
SECONDS = 900
NAMES = ("ends", "roles", "metadata", "freed", "ipv6")
CODE = """
import logging
import ascend_kv_fuzz as fuzz, ascend_kv_hostile as hostile, ascend_kv_storm as storm
logging.disable(logging.CRITICAL)
found = {}
for one, code in CASES.items():
    found[one] = eval(code)
assert state() == STATE, state()
"""


@once
def report(label: str, names: str, patches: str = PATCH) -> dict[str, Any]:
    """What cases find in a process of a release with the patch.

    Args:
        names: JSON: name -> code.
        patches: Or without one.
    """
    host = Host(label)
    start = START + (BUILT if label in BRANCHES else "") + opening(host)
    wanted = "applied" if patches == PATCH else "off"
    code = f"{start}\nCASES, STATE = {names}, {wanted!r}\n{CODE}{ENDING}"
    printed = host.run(code, patches=patches, seconds=SECONDS)
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def peers(release: str) -> dict[str, Any]:
    """The cases that take little time."""
    seed = session_seed()
    print(f"repeat with ASCEND_PATCH_SEED={seed}")
    cases = {one: f"hostile.{one}({seed})" for one in NAMES}
    cases["parameters"] = f"fuzz.parameters({seed}, {TRIED})"
    cases["wire"] = f"fuzz.wire({seed}, {TRIED})"
    cases["engines"] = f"hostile.engines({seed}, 16_500)"
    found = report(release, json.dumps(cases))
    print(json.dumps(found)[:6000])
    return found


def alone(release: str, code: str) -> Any:
    """One case in a process of its own."""
    found = report(release, json.dumps({"found": code}))["found"]
    print(code, json.dumps(found)[:4000], sep="\n")
    return found


@each_release
def test_a_read_that_ended_is_counted_once_and_for_its_own_attempt(release):
    shown.check_ends(peers(release)["ends"])


@each_release
def test_blocks_that_prefill_freed_while_they_were_read_are_not_right(release):
    shown.check_freed(peers(release)["freed"])


@each_release
def test_ipv6_and_a_port_that_is_taken(release):
    shown.check_ipv6(peers(release)["ipv6"])


@each_release
def test_a_request_for_the_wrong_server_is_computed(release):
    shown.check_roles(peers(release)["roles"])


@each_release
def test_what_a_prefill_rank_says_is_checked_before_anything_is_read(release):
    shown.check_metadata(peers(release)["metadata"])


@each_release
def test_random_requests(release):
    shown.check_parameters(peers(release)["parameters"])


@each_release
def test_random_metadata(release):
    shown.check_wire(peers(release)["wire"])


@each_release
def test_many_names_of_engines_do_not_end_pulls(release):
    shown.check_engines(peers(release)["engines"])


@each_release
def test_messages_of_any_kind_leave_the_listener_as_it_was(release):
    shown.check_floods(alone(release, f"hostile.floods({session_seed()}, {MESSAGES})"), KINDS)


@each_release
@pytest.mark.parametrize("variant", ["one", "two", "restart", "retries"])
def test_a_read_that_was_given_up_writes_to_no_other_request(release, variant):
    attempts = ATTEMPTS if variant == "one" else 500
    found = alone(release, f"storm.storm({session_seed()}, {variant!r}, {attempts})")
    if variant == "restart":
        shown.check_restart(found, attempts)
    elif variant == "retries":
        shown.check_retries(found, attempts)
    else:
        shown.check_storm(found, attempts, 2 if variant == "two" else 1)


@each_release
def test_too_many_kept_blocks_end_pulls_until_the_ranks_answer(release):
    shown.check_refuses(alone(release, f"storm.refuses({session_seed()})"))


@pytest.mark.parametrize("release", ["0.11.0", "0.13.0"])
def test_blocks_of_an_aborted_request_are_kept_while_it_is_pulled(release):
    """vLLM's own scheduler: unpatched they are free while a rank reads into them."""
    case = json.dumps({"aborted": f"__import__('ascend_kv_aborted').aborted({session_seed()})"})
    stock = report(release, case, "none")["aborted"]
    ours = report(release, case)["aborted"]
    print(stock, ours, sep="\n")
    whole, taken, aborted, ended = ours["free"]
    assert stock["free"][:3] == [whole, whole - 3, whole]
    assert (taken, aborted, ended) == (whole - 3, whole - 3, whole)
    assert ours["left"] == []
