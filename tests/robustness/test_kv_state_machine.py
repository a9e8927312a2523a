"""A state machine of both servers over a hostile channel: no write lands in another's block.

10,000 steps each day. `mutants` are implementations that are wrong in one decision each: for each
of them the same machine, or one scenario of it, says so.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from kv_machine import Machine
from tally import tally

pytest_plugins = ("kv_lab",)

STEPS, EACH, LENGTH = 10_000, 40, 50


def run(machine: type[Machine], lab: Any, start: int, *, steps: int, length: int = LENGTH) -> int:
    """Run a machine for at least so many steps; it raises what it finds, and prints the steps."""
    machine.lab = lab
    machine.counts = collections.Counter()
    given = settings(
        max_examples=EACH,
        stateful_step_count=length,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        # To shrink takes minutes, of which a day's run has none; the steps are printed as they are.
        phases=[Phase.generate],
    )
    number = 0
    while machine.counts["steps"] < steps:
        run_state_machine_as_test(seed(start + number)(machine), settings=given)
        number += 1
    return machine.counts["steps"]


@pytest.mark.fault("write_in_flight_is_forgotten")
@pytest.mark.fault("blocks_given_back_too_early")
def test_no_step_writes_into_a_block_of_another_owner(kv_lab, seed) -> None:
    taken = run(Machine, kv_lab, seed, steps=STEPS)
    assert taken >= STEPS
    # The control: what is meant to go wrong did, and requests were loaded all the same.
    counts = Machine.counts
    for what in ("restart", "partition", "exhaust records", "release a write", "loaded", "failed"):
        assert counts[what], f"there was no {what} in {taken} steps"
    note = ", ".join(f"{counts[what]} {what}" for what in sorted(counts) if what != "steps")
    tally("KV state machine: vLLM's connector", tried=taken, unit="steps", seed=seed, note=note)
