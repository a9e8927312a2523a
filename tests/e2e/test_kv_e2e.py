"""Real prefill and decode servers over Mooncake's TCP: any TP to any TP, held to one server.

The reference is the prefill server itself, asked to go on alone. The control is part of the claim:
two heads that change places in the decode server fail the same comparison there.
"""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import _disaggregated
import kv_servers
import logprobs
import pytest
from _disaggregated import Sizes
from _server import ServerError
from kv_servers import LENGTHS, SECONDS, Asked, Transfer, TransferLab
from server import wait_until

TOLERANCE = 1e-4
# How much more than the tolerance swapped heads must show, for the comparison to mean anything.
POWER = 10
MIXED = 16
STORM, MANY = 20, 200
QUICK = (("pull_timeout_s", 20), ("pull_retries", 3))
IMPATIENT = (("pull_timeout_s", 8), ("pull_retries", 1))
EXPIRES = (("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "20"),)
slow = pytest.mark.slow

DOWN, UP, SAME, TWO = Sizes(2, 1), Sizes(1, 2), Sizes(1, 1), Sizes(2, 2)
RATIOS = [
    # None of them is an everyday one: two servers take minutes to start where the cores are busy.
    # Every day the same is seen between processes without a model (test_kv_processes_e2e).
    *(
        pytest.param(setup, id=name, marks=slow)
        for name, setup in {
            "2-1-nhd-4": Transfer(DOWN, kv_heads=4, emulated=True),
            "2-1-hnd-2": Transfer(DOWN),
            "2-1-hnd-4": Transfer(DOWN, kv_heads=4),
            "2-1-hnd-1": Transfer(DOWN, kv_heads=1),
            "2-1-nhd-2": Transfer(DOWN, emulated=True),
            "2-1-nhd-1": Transfer(DOWN, kv_heads=1, emulated=True),
            "1-2-hnd-2": Transfer(UP),
            "1-2-hnd-4": Transfer(UP, kv_heads=4),
            "1-2-hnd-1": Transfer(UP, kv_heads=1),
            "1-2-nhd-4": Transfer(UP, kv_heads=4, emulated=True),
            "1-2-nhd-1": Transfer(UP, kv_heads=1, emulated=True),
            "1-1-hnd-2": Transfer(SAME),
            "1-1-nhd-2": Transfer(SAME, emulated=True),
            "2-2-hnd-4": Transfer(TWO, kv_heads=4),
            "2-2-nhd-4": Transfer(TWO, kv_heads=4, emulated=True),
            "2-2-hnd-1": Transfer(TWO, kv_heads=1),
        }.items()
    ),
]


@pytest.fixture(scope="session")
def transfers(lab) -> TransferLab:
    return TransferLab(lab)


def _limit(setup: Transfer) -> float:
    """How far a pair may be from one server.

    Not at all with as many ranks. But decode computes the prompt's last token by itself, and the
    emulated device's products then have another shape, and other roundings.
    """
    equal = setup.sizes.prefill == setup.sizes.decode
    return 0 if equal and not setup.emulated else TOLERANCE


@pytest.mark.parametrize("setup", RATIOS)
def test_a_pair_says_what_one_server_says(transfers, setup, measured) -> None:
    with transfers.pair(setup) as (pair, faults):
        alone = kv_servers.answers(pair.prefill)
        before = pair.decode.metric(kv_servers.HITS)
        found = kv_servers.follow(Asked(pair), alone)
        hits = pair.decode.metric(kv_servers.HITS) - before
        difference = logprobs.compare(alone, found)
        limit = _limit(setup)
        measured.append(
            f"{setup.name()}: logprobs within {difference.worst:.2g} of one server's, "
            f"{hits:.0f} tokens transferred"
        )
        # Hits alone prove nothing, but without any there was nothing to prove.
        assert hits >= sum(LENGTHS)
        assert difference.unlike == 0
        assert difference.worst <= limit

        together = kv_servers.at_once(pair.prefill, MIXED)
        same = kv_servers.at_once(Asked(pair), MIXED)
        mixed = logprobs.compare(*logprobs.until_parted(together, same))
        assert mixed.worst <= TOLERANCE

        for server in (pair.prefill, pair.decode):
            assert kv_servers.states(transfers.lab, server) == {"applied"}

        (faults / "fault").write_text("messages")
        unreliable = kv_servers.follow(Asked(pair), alone[1:4])
        assert logprobs.compare(alone[1:4], unreliable).worst <= limit

        if setup.kv_heads // setup.sizes.decode > 1:
            (faults / "fault").write_text("swap")
            swapped = kv_servers.follow(Asked(pair), alone)
            assert (faults / "swapped").exists()
            wrong = logprobs.compare(alone, swapped).worst
            measured.append(f"{setup.name()}, two heads swapped: {wrong:.2g} apart")
            assert wrong > POWER * TOLERANCE
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)


@slow
@pytest.mark.parametrize("setup", RATIOS)
def test_requests_under_faults_are_right_or_fail(transfers, setup, measured) -> None:
    with transfers.pair(setup) as (pair, faults):
        storm = kv_servers.storm(pair, faults, STORM, TOLERANCE)
        measured.append(f"{setup.name()}, {STORM} requests under faults: {storm}")
        assert not storm.wrong
        assert storm.right + storm.failed + storm.abandoned == STORM
        assert storm.right >= STORM // 2
        assert storm.slowest < SECONDS
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)


@slow
def test_two_hundred_requests_under_faults(transfers, measured) -> None:
    setup = Transfer(DOWN, kv_heads=4, emulated=True, policy="recompute", extra=QUICK)
    with transfers.pair(setup) as (pair, faults):
        storm = kv_servers.storm(pair, faults, MANY, TOLERANCE)
        measured.append(f"{setup.name()}, {MANY} requests under faults: {storm}")
        # Nothing fails here: what does not arrive is computed.
        assert (storm.wrong, storm.failed) == ([], 0)
        assert storm.right + storm.abandoned == MANY
        assert storm.slowest < SECONDS
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)


def stop_workers(server, number: signal.Signals) -> None:
    """Send a signal to all processes of a server's session, as a machine that stops would."""
    os.killpg(server.process.pid, number)


@slow
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_prefill_that_is_killed_while_it_writes_costs_its_request_alone(
    transfers, policy, measured
) -> None:
    setup = Transfer(DOWN, policy=policy, extra=(("pull_timeout_s", 20), ("pull_retries", 1)))
    with transfers.pair(setup) as (pair, faults), ThreadPoolExecutor(2) as pool:
        lead = kv_servers.answers(pair.prefill, (200, 40))
        local = kv_servers.answers(pair.decode, (40,))
        (faults / "fault").write_text("hold")
        began = time.monotonic()
        held = pool.submit(kv_servers.answer, Asked(pair), lead[0].prompt)
        assert wait_until(lambda: (faults / "writing-0").exists(), SECONDS)
        # Others go on meanwhile.
        assert logprobs.compare(local, kv_servers.answers(pair.decode, (40,))).worst == 0
        stop_workers(pair.prefill, signal.SIGKILL)
        (faults / "fault").write_text("")
        if policy == "recompute":
            again = held.result(SECONDS)
            assert logprobs.compare(lead[:1], (again,)).worst <= TOLERANCE
        else:
            with pytest.raises(ServerError, match="answered with 500"):
                held.result(SECONDS)
        measured.append(
            f"prefill killed while it wrote, {policy}: answered {time.monotonic() - began:.1f} s "
            "after it was asked"
        )
        assert kv_servers.blocks_are_free(pair.decode)
        assert logprobs.compare(local, kv_servers.answers(pair.decode, (40,))).worst == 0
        log = pair.decode.log.read_text()
        assert "prefill TP 2 -> decode TP 1, decode rank 0" in log
        assert re.search(r"prefill rank [01] at tcp://", log)


@slow
def test_a_decode_that_is_killed_while_it_is_written_to_costs_prefill_nothing(
    transfers, measured
) -> None:
    with (
        transfers.pair(Transfer(DOWN, variables=EXPIRES)) as (pair, faults),
        ThreadPoolExecutor(2) as pool,
    ):
        lead = kv_servers.answers(pair.prefill, (200, 40))
        (faults / "fault").write_text("hold")
        held = pool.submit(kv_servers.answer, Asked(pair), lead[0].prompt)
        assert wait_until(lambda: (faults / "writing-0").exists(), SECONDS)
        began = time.monotonic()
        stop_workers(pair.decode, signal.SIGKILL)
        (faults / "fault").write_text("")
        with pytest.raises(ServerError):
            held.result(SECONDS)
        assert logprobs.compare(lead, kv_servers.answers(pair.prefill, (200, 40))).worst == 0
        assert kv_servers.blocks_are_free(pair.prefill, seconds=60)
        measured.append(
            f"decode killed while it was written to: prefill's blocks free after "
            f"{time.monotonic() - began:.1f} s"
        )


@slow
@pytest.mark.parametrize("known", [True, False], ids=["known", "first"])
def test_a_prefill_that_stops_before_it_writes_is_given_up_in_time(
    transfers, known, measured
) -> None:
    """Ranks that decode has talked to hear of it when they go on; others only from the clock."""
    setup = Transfer(DOWN, policy="fail", extra=IMPATIENT, variables=() if known else EXPIRES)
    with transfers.pair(setup) as (pair, _):
        lead = kv_servers.answers(pair.prefill, (200,))
        if known:
            kv_servers.follow(Asked(pair), kv_servers.answers(pair.prefill, (40,)))
        engine, transfer = pair.engine(), "stopped"
        payload = {"model": "model", "prompt": list(lead[0].prompt), "max_tokens": 2}
        asked = _disaggregated.prefill_payload(payload, transfer)
        pair.prefill.post("/v1/completions", asked, SECONDS)
        payload["kv_transfer_params"] = pair.decode_parameters(transfer, engine)
        stop_workers(pair.prefill, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ServerError, match="answered with 500"):
            pair.decode.post("/v1/completions", payload, SECONDS)
        failed = time.monotonic() - began
        # It was not allowed to write, so nothing is kept for it.
        assert kv_servers.blocks_are_free(pair.decode)
        stop_workers(pair.prefill, signal.SIGCONT)
        goes_on = time.monotonic()
        assert kv_servers.blocks_are_free(pair.prefill, seconds=20 if known else 60)
        measured.append(
            f"prefill stopped, {'known' if known else 'not known'}: failed after {failed:.1f} s; "
            f"its blocks free {time.monotonic() - goes_on:.1f} s after it went on"
        )
        found = kv_servers.follow(Asked(pair), lead)
        assert logprobs.compare(lead, found).worst <= TOLERANCE


@slow
def test_blocks_of_a_pull_that_a_paused_prefill_writes_to_are_kept_until_it_is_done(
    transfers, measured
) -> None:
    setup = Transfer(DOWN, policy="fail", extra=IMPATIENT)
    with transfers.pair(setup) as (pair, faults), ThreadPoolExecutor(2) as pool:
        lead = kv_servers.answers(pair.prefill, (200,))
        (faults / "fault").write_text("hold")
        began = time.monotonic()
        held = pool.submit(kv_servers.answer, Asked(pair), lead[0].prompt)
        assert wait_until(lambda: (faults / "writing-0").exists(), SECONDS)
        with pytest.raises(ServerError, match="answered with 500"):
            held.result(SECONDS)
        measured.append(
            f"prefill stopped while it wrote: failed after {time.monotonic() - began:.1f} s"
        )
        # The request is answered; what may still be written to is not given away.
        assert not kv_servers.blocks_are_free(pair.decode, seconds=3)
        (faults / "fault").write_text("")
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)
        found = kv_servers.follow(Asked(pair), lead)
        assert logprobs.compare(lead, found).worst <= TOLERANCE

        # A client that hangs up meanwhile changes nothing of that.
        (faults / "writing-0").unlink()
        (faults / "fault").write_text("hold")
        gone = pool.submit(kv_servers.abandon, pair, lead[0].prompt, 4.0)
        assert wait_until(lambda: (faults / "writing-0").exists(), SECONDS)
        gone.result(SECONDS)
        assert not kv_servers.blocks_are_free(pair.decode, seconds=2)
        (faults / "fault").write_text("")
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)


@slow
def test_requests_that_are_preempted_say_the_same(transfers, measured) -> None:
    # Nine blocks of 128 tokens: each request needs a second one as it goes on.
    few = ("--num-gpu-blocks-override", "10")
    with transfers.pair(Transfer(UP, kv_heads=4, arguments=few)) as (pair, _):
        asked = [kv_servers.prompt(120 + i % 8, seed=11 + i) for i in range(12)]
        alone = tuple(kv_servers.answer(pair.prefill, one, 16) for one in asked)
        before = pair.decode.metric(kv_servers.PREEMPTED)
        with ThreadPoolExecutor(len(asked)) as pool:
            through = Asked(pair)
            found = tuple(pool.map(lambda one: kv_servers.answer(through, one, 16), asked))
        preempted = pair.decode.metric(kv_servers.PREEMPTED) - before
        worst = logprobs.compare(*logprobs.until_parted(alone, found)).worst
        measured.append(f"{preempted:.0f} preemptions: logprobs within {worst:.2g}")
        assert preempted > 0
        assert worst <= TOLERANCE
        assert kv_servers.blocks_are_free(pair.decode)
        assert kv_servers.blocks_are_free(pair.prefill)
