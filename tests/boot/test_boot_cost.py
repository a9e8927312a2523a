"""Off means off, armed is cheap: what the two leave in sys.modules, exactly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from house import constant

from ascend_patch import _bootstrap, _env

LIST = (
    "import sys, json; print(json.dumps({'modules': sorted(sys.modules), "
    "'meta_path': len(sys.meta_path), 'hooks': len(sys.path_hooks), 'sys': sorted(vars(sys))}))"
)
# What armed imports of the standard library beyond what a bare Python has loaded.
ARMED_STDLIB = {"__future__"}


def listing(house, **options):
    done = house.run("-c", LIST, **options)
    assert done.returncode == 0
    assert done.stderr == ""
    return json.loads(done.stdout)


def added(after, before):
    return set(after["modules"]) - set(before["modules"])


@pytest.mark.parametrize("form", ["drop-in", "installed"])
@pytest.mark.parametrize("value", [None, "", "  ", "none", " NONE ", "0", "off", "false", "no"])
def test_off_adds_the_drop_in_s_sitecustomize_and_nothing_else(form, value, house, shim, checkout):
    bare = listing(house)
    options = {} if value is None else {"ASCEND_PATCHES": value}
    if form == "installed":
        house.install(shim)
    else:
        options["path"] = (checkout,)
    off = listing(house, **options)
    assert added(off, bare) == ({"sitecustomize"} if form == "drop-in" else set())
    for what in ("meta_path", "hooks", "sys"):
        assert off[what] == bare[what], what


@pytest.mark.parametrize("form", ["drop-in", "installed"])
@pytest.mark.parametrize("value", ["all", "rotary", "no such patch", "all,-rotary"])
def test_armed_adds_our_modules_and_no_third_party_one(form, value, house, shim, checkout):
    bare = listing(house)
    options = {"path": (checkout,)} if form == "drop-in" else {}
    if form == "installed":
        house.install(shim)
    armed = listing(house, ASCEND_PATCHES=value, **options)
    new = added(armed, bare) - {"sitecustomize"}
    ours = {name for name in new if name.partition(".")[0] == "ascend_patch"}
    assert new - ours <= ARMED_STDLIB
    assert {"ascend_patch", "ascend_patch._bootstrap", "ascend_patch._finder"} <= ours
    assert not ours & {"ascend_patch._runtime", "ascend_patch._registry", "ascend_patch.kernels"}
    assert armed["meta_path"] == bare["meta_path"] + 1
    assert armed["sys"] == bare["sys"]


def test_the_words_for_off_are_the_same_everywhere(checkout):
    assert constant(checkout / "sitecustomize.py", "_OFF") == _bootstrap.OFF
    assert _bootstrap.OFF == _env.NOT_ACTIVATED
    assert _bootstrap.STRICT == _env.STRICT
    assert repr(_bootstrap.OFF) in constant(checkout / "setup.py", "OPEN_THE_DOOR")


def test_the_benchmark_runs_and_writes_what_it_measured_on(checkout, tmp_path):
    file = tmp_path / "startup.csv"
    command = [sys.executable, str(checkout / "scripts" / "bench"), "startup"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--csv", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with file.open() as lines:
        rows = {row["what"]: row for row in csv.DictReader(lines)}
    assert {"bare python", "off", "armed", "finder miss"} <= set(rows)
    assert all(row["python"] and row["cpu"] and row["commit"] for row in rows.values())
    # Generous on purpose; the figures are the benchmark's business.
    assert float(rows["finder miss"]["ms"]) < 0.05


def test_an_unknown_benchmark_names_the_known_ones(checkout):
    done = subprocess.run(
        [sys.executable, str(checkout / "scripts" / "bench"), "nope"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "startup" in done.stdout
