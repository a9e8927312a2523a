"""20,000 malformed files: none ends a report, and none hides a healthy server."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import status_fuzz
from status_fuzz import draw
from status_site import DEMO, runs, server
from tally import tally

from ascend_patch import _calls, _files, _rundir, _status, _status_read, _status_schema

FILES = 20_000
BATCH = 500
RUN = "20250101T000000-1"


class Site:
    """A directory of runs with a healthy server, and one run that batches of files are put into."""

    def __init__(self, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (self.healthy,) = runs(host)
        self.root = self.healthy.parent
        self.monkeypatch = monkeypatch
        self.kinds: Counter[str] = Counter()
        self.batches = 0
        self.name(host.status, named=True)
        (found,) = _status_read.read().runs
        assert found["alive"]
        self.alive = found

    def name(self, folder: Path, *, named: bool) -> None:
        """Name the directory explicitly, or let it be the user's own runtime directory."""
        variables = ["ASCEND_PATCHES_STATUS_DIR", "XDG_RUNTIME_DIR"]
        self.monkeypatch.setenv(variables.pop(0 if named else 1), str(folder))
        self.monkeypatch.delenv(variables[0], raising=False)
        # Not what lies in the machine's own temporary directory.
        self.monkeypatch.setattr(_rundir, "_default_places", lambda: [folder])
        self.named = named

    def batch(self, rng: random.Random, many: int = BATCH) -> None:
        """Draw a batch, and check the report."""
        place = self.root / RUN
        place.mkdir()
        drawn = {}
        for number in range(many):
            pid = 4_194_304 + number
            stem = f"{pid}-{rng.randrange(10**9)}"
            one = drawn[stem] = draw(rng, pid, self.healthy)
            one.make(place / f"{stem}.json")
            self.kinds[one.kind] += 1
        try:
            words = (("--all",), ("--json",))[self.batches % 2]
            self.batches += 1
            status_fuzz.check(drawn, self.healthy.name, self.alive, named=self.named, words=words)
        finally:
            shutil.rmtree(place)

    def two_batches(self, rng: random.Random) -> None:
        """One for each kind of report."""
        self.batch(rng)
        self.batch(rng)


@pytest.fixture
def site(host, monkeypatch):
    host.patches(DEMO)
    with server(host):
        yield Site(host, monkeypatch)


@pytest.mark.fault("malformed_status_file")
@pytest.mark.fault("status_of_another_user")
def test_no_file_ends_a_report_or_hides_a_healthy_server(site, seed, tmp_path):
    rng = random.Random(seed)
    began, slowest = time.process_time(), 0.0
    for number in range(FILES // BATCH):
        site.name(tmp_path / "status", named=number % 4 < 2)
        before = time.process_time()
        site.batch(rng)
        slowest = max(slowest, time.process_time() - before)
    # Every kind was tried.
    assert len(site.kinds) >= 20
    assert min(site.kinds.values()) > 50
    # A batch is drawn, and read twice; deep or large ones cost no more than others.
    assert slowest < 20
    cost = time.process_time() - began
    note = f"{1e6 * cost / FILES / 2:.0f} us of CPU time a file and reading"
    tally("status reader: malformed files", tried=FILES, unit="files", seed=seed, note=note)


def believes(data: bytes, pid: int) -> dict[str, Any]:
    return status_fuzz.full_record() | json.loads(data)


def opens_anything(name: str, directory: int, owner: int | None) -> int:
    return os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)


MUTANTS = {
    "no schema": (_status_schema, "record", believes),
    "no escapes": (_status_schema, "printable", str),
    "links and devices": (_files, "open_regular", opens_anything),
    "any owner": (_files, "_check_owner", lambda *_: None),
    "any number": (_status_schema, "_bounded", lambda *_: None),
    "only the first files": (_status_read, "MAX_FILES", 3),
    "any process runs": (_calls, "is_held", lambda *_: True),
}


# A rule of the report is broken, or it ends in what a careless reader runs into.
FAILURES = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzzer_finds_a_reader_that_is_careless(site, seed, monkeypatch, tmp_path, mutant):
    module, name, replacement = MUTANTS[mutant]
    rng = random.Random(seed)
    site.name(tmp_path / "status", named=False)
    site.batch(rng, 50)
    monkeypatch.setattr(module, name, replacement)
    if mutant == "no escapes":
        monkeypatch.setattr(_status, "printable", str)
    with pytest.raises(FAILURES):
        site.two_batches(rng)
