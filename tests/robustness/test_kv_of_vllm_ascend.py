"""vllm-ascend's connector: hostile peers, requests and storms, without vllm-ascend.

What vllm-ascend 0.18.0's classes do is played by `tests/ascend/ascend_kv_standin.py`, with the
patch's own table of targets wrapped around it; so this shows what the shim's code does, not what
the releases do. The same cases run on the real classes of four releases, with more messages, in
`tests/ascend/test_kv_hostile_on_vllm_ascend.py` (slow).
"""

from __future__ import annotations

import functools
import json
import os
import resource
import secrets
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tally import tally

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "ascend"
sys.path.append(str(CASES))

import ascend_kv_shown as shown  # noqa: E402
from ascend_kv_attacker import KINDS  # noqa: E402

pytest.importorskip("vllm", reason="missing: vLLM, of which the shim's connector uses the settings")

MESSAGES, TRIED, ATTEMPTS = 2000, 25_000, 100
OPENING = f"""
import json, logging, os, sys
sys.path[:0] = [{str(CASES)!r}, {str(ROOT)!r}]
import ascend_kv_standin
ascend_kv_standin.install()
import ascend_kv
assert ascend_kv_standin.apply() > 10
logging.disable(logging.CRITICAL)
import ascend_kv_fuzz as fuzz, ascend_kv_hostile as hostile, ascend_kv_storm as storm
"""
ENDING = """
print(flush=True)
print(json.dumps(found), flush=True)
os._exit(0)
"""
MEMORY = 24 << 30


def limited() -> None:
    """A request that asks for more memory than there is fails, and not the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@functools.cache
def found(code: str) -> Any:
    """What a case finds in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{OPENING}\nfound = {code}\n{ENDING}"],
        env={**os.environ, "ASCEND_PATCHES": "off"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=limited,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    print(code, json.dumps(report)[:4000], sep="\n")
    return report


@functools.cache
def peers() -> Any:
    """The cases that take little time, in one process."""
    seed = int(os.environ.get("ASCEND_PATCH_SEED", secrets.randbelow(2**31)))
    print(f"repeat with ASCEND_PATCH_SEED={seed}")
    names = ("ends", "roles", "metadata", "freed", "ipv6")
    cases = ", ".join(f"{name!r}: hostile.{name}({seed})" for name in names)
    return found(f"{{{cases}, 'engines': hostile.engines({seed}, 16_500)}}")


@pytest.mark.fault("ascend_blocks_given_back_too_early")
def test_a_read_that_ended_is_counted_once_and_for_its_own_attempt():
    shown.check_ends(peers()["ends"])


@pytest.mark.fault("ascend_blocks_given_back_too_early")
def test_blocks_that_prefill_freed_while_they_were_read_are_not_right():
    shown.check_freed(peers()["freed"])


def test_ipv6_and_a_port_that_is_taken():
    shown.check_ipv6(peers()["ipv6"])


class OlderScheduler(SimpleNamespace):
    """vLLM's of 0.13, as far as it frees blocks."""

    def _free_blocks(self, request):
        self.freed.append(request.request_id)


@pytest.mark.fault("ascend_blocks_given_back_too_early")
def test_blocks_of_an_aborted_request_are_kept_while_a_rank_pulls_to_them():
    """vLLM 0.11 and 0.13 free them at once; what they ask is the connector's scheduler."""
    from ascend_patch.impl import kv_ascend_kept as kept

    kind = type("Connector", (SimpleNamespace,), {"__module__": "vllm_ascend.mooncake_connector"})
    transfer = SimpleNamespace(kv_role="kv_consumer")
    connector = kind(_reqs_need_recv={}, vllm_config=SimpleNamespace(kv_transfer_config=transfer))
    meta = SimpleNamespace(local_block_ids=[1])
    request = SimpleNamespace(
        request_id="aborted", kv_transfer_params={}, arrival_time=0.0, is_finished=lambda: True
    )
    connector._reqs_need_recv["aborted"] = (request, [1])
    built = SimpleNamespace(requests={"aborted": meta})
    kept.build_connector_meta(lambda _: built, connector, (None,), {})
    asked = kept.request_finished(lambda *_: (False, None), connector, (request, [1]), {})
    assert asked == (True, None), "the blocks are another's, and a rank pulls to them"
    # Another one that is not pulled is the release's own to end.
    other = SimpleNamespace(request_id="other", kv_transfer_params=None)
    assert not kept.request_finished(lambda *_: (False, None), connector, (other, []), {})[0]
    from ascend_patch.impl import kv_ascend_admit as admit

    scheduler = OlderScheduler(
        connector=SimpleNamespace(connector_scheduler=connector),
        requests={"aborted": request},
        freed=[],
    )
    output = SimpleNamespace(finished_recving={"aborted", "loaded"})
    admit.update_from_kv_xfer_finished(lambda _: None, scheduler, (output,), {})
    assert scheduler.freed == ["aborted"]
    assert output.finished_recving == {"loaded"}


@pytest.mark.fault("ascend_messages_unchecked")
def test_a_request_for_the_wrong_server_is_computed():
    shown.check_roles(peers()["roles"])


@pytest.mark.fault("ascend_messages_unchecked")
def test_what_a_prefill_rank_says_is_checked_before_anything_is_read():
    shown.check_metadata(peers()["metadata"])


@pytest.mark.fault("ascend_messages_unchecked")
def test_many_names_of_engines_do_not_end_pulls():
    shown.check_engines(peers()["engines"])


@pytest.mark.fault("ascend_messages_unchecked")
def test_random_requests_and_metadata(seed):
    report = found(
        f"{{'parameters': fuzz.parameters({seed}, {TRIED}), 'wire': fuzz.wire({seed}, {TRIED})}}"
    )
    shown.check_parameters(report["parameters"])
    shown.check_wire(report["wire"])
    slowest = max(report[name]["slowest"] for name in report) * 1000
    tally(
        "wire of vllm-ascend's connector: random requests and metadata (stand-in classes)",
        tried=2 * TRIED,
        unit="messages",
        seed=seed,
        note=f"slowest {slowest:.1f} ms",
    )


@pytest.mark.fault("ascend_messages_unchecked")
def test_messages_of_any_kind_leave_the_listener_as_it_was(seed):
    report = found(f"hostile.floods({seed}, {MESSAGES})")
    shown.check_floods(report, KINDS)
    tally(
        "listener of vllm-ascend's connector: hostile peers (stand-in classes)",
        tried=MESSAGES * len(KINDS),
        unit="messages",
        seed=seed,
        note=f"largest growth {max(report[kind]['grown'] for kind in KINDS) / 2**20:.1f} MiB",
    )


@pytest.mark.fault("ascend_blocks_given_back_too_early")
def test_a_read_that_was_given_up_writes_to_no_other_request(seed):
    report = found(f"storm.storm({seed}, 'one', {ATTEMPTS})")
    shown.check_storm(report, ATTEMPTS, 1)
    tally(
        "decode ranks of vllm-ascend: a read that is given up and writes late (stand-in classes)",
        tried=report["newer"],
        unit="newer requests",
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two", "restart", "retries"])
def test_variants_of_the_storm(seed, variant):
    report = found(f"storm.storm({seed}, {variant!r}, {ATTEMPTS})")
    if variant == "two":
        shown.check_storm(report, ATTEMPTS, 2)
    elif variant == "restart":
        shown.check_restart(report, ATTEMPTS)
    else:
        shown.check_retries(report, ATTEMPTS)


@pytest.mark.slow
def test_too_many_kept_blocks_end_pulls_until_the_ranks_answer(seed):
    shown.check_refuses(found(f"storm.refuses({seed})"))
