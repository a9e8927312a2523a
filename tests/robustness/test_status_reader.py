"""What the reader of the status makes of files that somebody else, or nobody, has written."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from status_fuzz import full_record
from status_site import DEMO, cli, ended, environment, runs, server, start, status

RUN = "20250101T000000-{}"
STEM = "4194304-1"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n\x00"
DEEP = {"lists": "[" * 100_000, "closed": "[" * 900 + "]" * 900, "objects": '{"a":' * 50_000}


def others(record: dict[str, Any]) -> dict[str, Any]:
    """Contents that are no record, by what they are; bytes, text, or what JSON is made of."""
    patch = record["patches"][0]
    target = patch["targets"][0]
    found: dict[str, Any] = {
        "empty": "",
        "cut": json.dumps(record)[:-40],
        "bytes": b"\xff\xfe\x00",
        "a list": [],
        "an object": {},
        "null": None,
        "a number": 1,
        "a text": "x",
        "another schema": {"version": 2, "servers": [{"pid": 1}]},
        "not finite": json.dumps(record).replace(str(record["started"]), "NaN"),
        "digits": json.dumps(record).replace(str(record["started"]), "9" * 100_000),
        "exponent": json.dumps(record).replace(str(record["started"]), "1e999"),
        "large": " " * (5 << 20) + json.dumps(record),
        **{f"deep {name}": text for name, text in DEEP.items()},
    }
    for name in ("pid", "role", "started", "patches"):
        found[f"without {name}"] = {key: value for key, value in record.items() if key != name}
        found[f"{name} is no {name}"] = record | {name: {"a": None}}
    for name in ("kernels", "verification", "problems", "counters", "versions", "peers"):
        found[f"{name} is 1"] = record | {name: 1}
    found["targets are none"] = record | {"patches": [patch | {"targets": None}]}
    for calls in (-1, 2**64, "1", None, 1.5, True):
        wrong = patch | {"targets": [target | {"calls": calls}]}
        found[f"calls are {calls!r}"] = record | {"patches": [wrong]}
    return found


@pytest.mark.fault("malformed_status_file")
def test_each_malformed_file_is_one_line_and_hides_no_healthy_server(host):
    host.patches(DEMO)
    with server(host):
        (healthy,) = runs(host)
        (file,) = healthy.glob("*.json")
        record = json.loads(file.read_text()) | {"pid": int(STEM.partition("-")[0])}
        planted = {}
        for number, (what, content) in enumerate(others(record).items()):
            path = healthy.parent / RUN.format(number) / f"{STEM}.json"
            path.parent.mkdir()
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            planted[what] = path
        # A later one than that of the server, as a new server's would be.
        newest = healthy.parent / "20991231T000000-1" / f"{STEM}.json"
        newest.parent.mkdir()
        newest.write_text("{}")
        for words in ((), ("--all",)):
            done = cli(host, "status", *words)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"run {healthy.name}: running")
            lines = done.stdout.splitlines()
            wrong = {
                what: [line for line in lines if str(path) in line]
                for what, path in {**planted, "newest": newest}.items()
            }
            assert {what: len(found) for what, found in wrong.items()} == dict.fromkeys(wrong, 1)
            assert max(len(line) for line in lines) < 400
        found = status(host)
        assert [run["id"] for run in found["runs"]] == [healthy.name]
        assert len(found["problems"]) == len(planted) + 1
        # The control: the record of which they are made is one.
        planted["empty"].write_text(json.dumps(record))
        assert len(status(host)["runs"]) == 2


@pytest.mark.fault("status_of_another_user")
@pytest.mark.parametrize("kind", ["FIFO", "link to /dev/zero", "link to a record", "directory"])
def test_what_is_no_regular_file_is_not_opened(host, kind):
    host.patches(DEMO)
    with server(host):
        (healthy,) = runs(host)
        (record,) = healthy.glob("*.json")
        for ending in ("json", "calls"):
            path = healthy / f"{STEM}.{ending}"
            if kind == "FIFO":
                os.mkfifo(path)
            elif kind == "directory":
                path.mkdir()
            else:
                path.symlink_to("/dev/zero" if "zero" in kind else record)
        # Where one is opened that never ends, this ends it.
        limits = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
        code = f"{limits}from ascend_patch.cli import main; raise SystemExit(main())"
        done = ended(
            [sys.executable, "-c", code, "status"],
            env=environment(host, FAKE_DOOR="", ASCEND_PATCHES=""),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"run {healthy.name}: running")
        (line,) = [line for line in done.stdout.splitlines() if f"{STEM}.json" in line]
        assert line.endswith("and no regular file")


@pytest.mark.fault("status_of_another_user")
def test_control_characters_never_reach_the_terminal(host):
    host.patches(DEMO)
    start(host)
    ((file,),) = [run.glob("*.json") for run in runs(host)]
    record = json.loads(file.read_text())
    patch = record["patches"][0]
    patch |= {"reason": ESCAPES, "state": f"applied{ESCAPES}", "notes": [ESCAPES]}
    record |= {"role": f"front{ESCAPES}", "problems": [ESCAPES], "host": ESCAPES}
    record |= {"kernels": {ESCAPES: 1}, "self_tests": {ESCAPES: ESCAPES}, "selection": "\ud800"}
    file.write_text(json.dumps(record))
    for encoding in ("utf-8", "ascii"):
        for words in ((), ("--json",)):
            done = cli(host, "status", *words, more={"PYTHONIOENCODING": encoding})
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.replace("\n", "").isprintable()
            # The control: what was written is there, and can be read.
            assert "x1b]0;owned" in done.stdout or "u001b]0;owned" in done.stdout


AS_USER = """
import contextlib, io, os, sys
from ascend_patch import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["status"])  # imports what the user may have no right to read
for name in ("ASCEND_PATCHES_STATUS_DIR", "XDG_RUNTIME_DIR"):
    os.environ.pop(name, None)
os.environ["TMPDIR"] = sys.argv[1]
os.setgroups([])
os.setresgid(1, 1, 1)
os.setresuid(1, 1, 1)
sys.exit(cli.main(["status"]))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A temporary directory as all users have it."""
    if os.geteuid() != 0:
        pytest.skip("root is missing")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def give(path: Path, user: int) -> None:
    """Make everything another user's, for all to read."""
    for one in (path, *path.rglob("*")):
        os.chown(one, user, user)
        one.chmod(0o755 if one.is_dir() else 0o644)


@pytest.mark.fault("status_of_another_user")
def test_the_directory_of_another_user_is_not_believed(host, shared):
    host.patches(DEMO)
    start(host)
    (run,) = runs(host)
    own = shared / "ascend-patch-1"
    shutil.copytree(run, own / run.name)

    def asked() -> str:
        command = [sys.executable, "-c", AS_USER, str(shared)]
        more = {"FAKE_DOOR": "", "ASCEND_PATCHES": "", "ASCEND_PATCHES_STATUS_DIR": str(shared)}
        done = ended(command, env=environment(host, **more))
        assert "Traceback" not in done.stderr
        return done.stdout

    give(own, 2)
    said = asked()
    assert f"run {run.name}" not in said
    assert f"{own}: it belongs to user 2, and not to user 1" in said
    # One of its files, in a directory of one's own.
    os.chown(own, 1, 1)
    said = asked()
    assert f"run {run.name}" not in said
    assert "it belongs to user 2" in said
    # The control: what is one's own is believed.
    give(own, 1)
    assert f"run {run.name}: ended" in asked()


def test_below_a_directory_that_was_named_other_users_are_shown_as_such(host, shared):
    """A server may run as another user than the one who asks."""
    host.patches(DEMO)
    start(host)
    (run,) = runs(host)
    shutil.copytree(run, shared / "ascend-patch-7" / run.name)
    give(shared / "ascend-patch-7", 7)
    done = cli(host, "status", more={"ASCEND_PATCHES_STATUS_DIR": str(shared)})
    assert done.stdout.startswith(f"run {run.name} of user 7: ended")
    assert done.returncode == 0


@pytest.mark.parametrize(("error", "limit"), [(None, None), (None, 4.0), (0.5, None)])
def test_a_patch_that_was_compared_with_nothing_yet_is_no_malformed_file(error, limit):
    """As VERIFY writes it before the first call, and where a result was infinitely far off."""
    from ascend_patch import _status, _status_schema

    written = full_record()
    written["verification"]["demo"].update(error=error, limit=limit)
    read = _status_schema.record(json.dumps(written).encode(), written["pid"])
    assert (read["verification"]["demo"]["error"], read["verification"]["demo"]["limit"]) == (
        error,
        limit,
    )
    assert _status._compared("demo", read["verification"]["demo"]).startswith("verify of demo: 2")
