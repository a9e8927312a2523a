"""A server with every patch under mixed load: its memory, its states, its time per token.

What scripts/soak runs, with its own control: in the end each process of the server leaks on
purpose, and that must be noticed.
"""

from __future__ import annotations

import os

import _soak_load
import _soak_report
import _soak_run
import pytest
from _env import DEFAULT, Environment
from _soak_memory import MIB
from interpreters import find_python
from server import Lab

# With two starts, what warms the server, the comparison and the control, five and a half minutes.
EVERY_DAY, LONG = 3.0, 30.0
# Of a server that serves: tens of requests a minute in the smallest machine.
FEWEST_REQUESTS = 30


@pytest.mark.parametrize(
    "minutes",
    [pytest.param(EVERY_DAY, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)],
)
def test_a_patched_server_stays_as_it_is(lab: Lab, minutes: float, measured: list[str]) -> None:
    python = find_python(DEFAULT)
    env = Environment(python.patched, python.plain, "cpu", python.preload, python.drop_in)
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    report = _soak_run.soak(
        env, DEFAULT, lab.folder / f"soak-{minutes:g}", minutes=minutes, rounds=10, seed=seed
    )
    print(_soak_report.to_markdown(report))
    assert report.wrong == []
    grown = ", ".join(f"{one.name} {one.grown / MIB:+.1f}" for one in report.growths)
    measured.append(
        f"soak, {minutes:g} minutes: {report.sent.total()} requests, {sum(report.tokens)} tokens; "
        f"grown in the second half, MiB: {grown}; in {report.seconds:.0f} s"
    )
    measured.append(f"soak, the shim's overhead: {report.pace}")
    # The run was one: all kinds of requests, in numbers, and patches that were called.
    assert report.sent.total() >= FEWEST_REQUESTS * minutes, report.sent
    assert set(report.sent) == set(_soak_load.KINDS), report.sent
    assert report.patches["rotary"].state == "applied"
    # A call turns what a step holds of all requests: fewer than tokens, more than requests.
    assert report.patches["rotary"].calls > report.sent.total()
    roles = {one.name.partition("_")[0] for one in report.growths}
    assert {"front end", "EngineCore"} <= roles, roles
