"""Mooncake's real engine over TCP, between two plain processes: pushes that end, whatever happens.

The control is the engine's own call for many ranges, which fails where ours must not.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import _disaggregated
import pytest

RUN = Path(__file__).with_name("kv_engine_run.py")
# More ranges than Mooncake 0.3.13 queues for a peer (1024, and as many for a second).
RANGES, LENGTH, PAUSE_S = 3000, 1024, 2.0


@pytest.fixture(scope="module")
def seen(lab, tmp_path_factory) -> dict[str, dict[str, float]]:
    python = lab.python
    paths = [python.drop_in, str(_disaggregated.engine_folder(python.plain))]
    done = subprocess.run(
        [str(python.patched), str(RUN), json.dumps([RANGES, LENGTH, PAUSE_S])],
        cwd=tmp_path_factory.mktemp("kv-engine"),
        env=os.environ | {"PYTHONPATH": ":".join(path for path in paths if path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_more_ranges_than_the_engine_queues_all_arrive(seen, measured) -> None:
    measured.append(f"{RANGES} ranges of {LENGTH} B over TCP: {seen['many']['seconds']:.2f} s")
    assert (seen["many"]["code"], seen["many"]["right"]) == (0, True)
    assert seen["host"]["code"] != 0


def test_a_peer_that_stops_is_waited_for_without_spinning(seen, measured) -> None:
    stopped = seen["stopped"]
    measured.append(
        f"a push to a peer that stops for {PAUSE_S:g} s: {stopped['on_core']:.2f} s on a core"
    )
    assert stopped["waited"]
    assert (stopped["code"], stopped["right"]) == (0, True)
    assert stopped["on_core"] < PAUSE_S / 4


def test_a_peer_that_is_killed_ends_the_push(seen) -> None:
    assert seen["killed"]["waited"]
    assert seen["killed"]["code"] == -1
    assert seen["killed"]["seconds"] < PAUSE_S + 30


def test_another_peer_is_written_to_after_that(seen) -> None:
    assert seen["another"] == {"code": 0, "right": True}
