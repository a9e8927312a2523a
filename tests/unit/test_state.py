"""The record of a process, its counters, and the directory that holds them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ascend_patch import _calls, _files, _liveness, _prune, _rundir, _state, _status
from ascend_patch._calls import SLOTS, Counters
from ascend_patch._state import PatchState, ProcessState, TargetState


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the runs of this user are, below what the variable names."""
    monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", str(tmp_path / "status"))
    monkeypatch.setenv("ASCEND_PATCHES_RUN", "")
    return tmp_path / "status" / f"ascend-patch-{os.getuid()}"


@pytest.fixture
def state(root):
    made = ProcessState()
    made.open_files()
    made.write()
    return made


def status_file(root: Path) -> Path:
    (found,) = root.glob("*/*.json")
    return found


# Counters


def test_counters_are_read_by_another_process_while_this_one_runs(tmp_path):
    counters = Counters()
    first, second = counters.counter("first"), counters.counter("second")
    first()
    counters.share(tmp_path / "x.calls")
    first(), second()
    script = (
        "import os, sys; from ascend_patch._calls import read;"
        "print(read('x.calls', os.open(sys.argv[1], os.O_RDONLY), None, ['first', 'second']))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    repository = str(Path(_calls.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.stdout.strip() == "{'first': 2, 'second': 1}", done.stderr


def test_more_counters_than_slots_share_the_last_one():
    counters = Counters()
    count = [counters.counter(f"n{i}") for i in range(SLOTS + 3)]
    count[0](), count[SLOTS + 2]()
    assert counters.value("n0") == 1
    assert counters.value("n1") == 0
    assert counters.value(f"n{SLOTS + 2}") == counters.value(f"n{SLOTS - 1}") == 1


def test_a_name_that_was_never_counted_is_zero():
    assert Counters().value("nobody") == 0


def test_counters_that_are_not_mapped_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(_calls, "KEEP_PROMISES", ())
    counters = Counters()
    count = counters.counter("a")
    counters.share(tmp_path / "x.calls")
    assert counters.kept == "written"
    for _ in range(3):
        count()
    # Not each call writes; the next one after a while does, and a record does.
    counters._due = 0.0
    count()
    with _files.opened(tmp_path) as directory:
        assert _calls.read("x.calls", directory, None, ["a"]) == {"a": 4}
        assert _calls.is_held("x.calls", directory, None)
        count()
        counters.flush()
        assert _calls.read("x.calls", directory, None, ["a"]) == {"a": 5}
        # What somebody has put in its place is not written to.
        (tmp_path / "x.calls").unlink()
        (tmp_path / "x.calls").write_bytes(b"another's")
        count()
        counters.flush()
    assert (tmp_path / "x.calls").read_bytes() == b"another's"
    assert (counters.kept, counters.value("a")) == ("memory", 6)


def test_the_same_name_counted_twice_is_one_counter():
    counters = Counters()
    counters.counter("a")(), counters.counter("a")()
    assert (counters.value("a"), counters.names) == (2, ["a"])


def test_threads_that_make_counters_at_once_make_each_once():
    counters = Counters()
    names = [f"n{i % 7}" for i in range(70)]
    threads = [threading.Thread(target=counters.counter, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counters.names) == sorted(set(names))


@pytest.mark.parametrize("content", [None, b"", b"odd"], ids=["missing", "empty", "cut off"])
def test_a_counter_file_that_is_no_good_reads_as_nothing(tmp_path, content):
    path = tmp_path / "x.calls"
    if content is not None:
        path.write_bytes(content)
    with _files.opened(tmp_path) as directory:
        assert _calls.read(path.name, directory, None, ["a"]) == {}


# The status file


def test_a_snapshot_is_plain_data(state):
    state.patches["demo"] = PatchState(
        "demo", "1", "applied", "because", targets=[TargetState("vllm.ops:f", "host", "applied")]
    )
    state.counters.counter("demo/vllm.ops:f")()
    state.counters.counter("kernel/rope")()
    found = json.loads(json.dumps(state.snapshot()))
    assert found["patches"][0]["targets"][0]["calls"] == 1
    assert found["kernels"] == {"rope": 1}
    assert found["pid"] == os.getpid()


def test_the_status_file_is_replaced_and_never_half_written(state, root, monkeypatch):
    before = status_file(root).read_text()

    def fails(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fails)
    state.facts["new"] = 1
    state.write()
    assert status_file(root).read_text() == before
    (run,) = root.iterdir()
    assert state.problems == [f"no status file: {run}: the disk is full"]
    assert sorted(path.suffix for path in root.glob("*/*")) == [".calls", ".json"]
    monkeypatch.undo()
    state.write()
    assert json.loads(status_file(root).read_text())["new"] == 1


def test_threads_write_one_status_file_without_a_problem(state, root):
    def work():
        for _ in range(20):
            state.write()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.problems == []
    assert json.loads(status_file(root).read_text())["pid"] == os.getpid()


def test_a_command_line_that_is_not_text_is_no_problem(state, root, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "a\udc80\nb"])
    state.write()
    assert json.loads(status_file(root).read_text())["command"] == "python a\udc80 b"


@pytest.mark.parametrize("obstacle", ["a file", "read-only parent", "somebody else's"])
def test_without_a_directory_one_line_says_so_and_counting_goes_on(
    root, monkeypatch, capfd, obstacle
):
    if obstacle == "a file":
        root.parent.mkdir()
        root.write_text("")
    elif obstacle == "somebody else's":
        root.mkdir(parents=True)
        monkeypatch.setattr(os, "geteuid", lambda: 123456)
    else:
        monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", "/proc/nowhere")
    state = ProcessState()
    state.open_files()
    state.write()
    count = state.counters.counter("a")
    count()
    assert state.counters.value("a") == 1
    (problem,) = state.problems
    assert "set ASCEND_PATCHES_STATUS_DIR" in problem
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "role"), [("MainProcess", "front end"), ("EngineCore_0", "EngineCore_0")]
)
def test_a_role_is_what_vllm_calls_the_process(monkeypatch, name, role):
    import multiprocessing

    monkeypatch.setattr(multiprocessing.process.current_process(), "_name", name)
    assert _state.role() == role


def test_a_ray_worker_is_known_by_its_script(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", object())
    monkeypatch.setattr(sys, "argv", ["/x/ray/_private/workers/default_worker.py"])
    assert _state.role() == "ray worker"


# The run directory


def test_a_child_joins_the_run_of_its_parent(root, state):
    assert state.begins_run
    again = ProcessState()
    again.open_files()
    assert not again.begins_run
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize("run", ["gone", "..", ".", "a/../..", "../status", "20261121T193704-1"])
def test_a_run_that_is_not_one_of_ours_is_not_joined(root, monkeypatch, run):
    (root / "gone").mkdir(parents=True)
    monkeypatch.setenv("ASCEND_PATCHES_RUN", run)
    entered = _rundir.enter()
    assert entered.begins
    assert entered.path.parent == root
    assert entered.name == os.environ["ASCEND_PATCHES_RUN"] != run


def test_a_run_that_a_cleaner_of_temporary_files_removed_is_made_again(root, state):
    (run,) = root.iterdir()
    for file in run.iterdir():
        file.unlink()
    run.rmdir()
    root.rmdir()
    state.counters.counter("kernel/rope")()
    state.write()
    assert state.problems == []
    (found,) = _status.runs(root)
    assert (found["id"], found["alive"]) == (run.name, True)
    assert found["processes"][0]["kernels"] == {"rope": 1}


def test_the_directory_is_the_users_own(root, state):
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("writable", [True, False])
def test_the_runtime_directory_is_used_where_it_can_be(tmp_path, monkeypatch, writable):
    monkeypatch.delenv("ASCEND_PATCHES_STATUS_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path if writable else tmp_path / "gone"))
    name = f"ascend-patch-{os.getuid()}"
    assert str(_rundir.base()).endswith(str(tmp_path / name if writable else name))


def run_name(number: int, pid: int = 1) -> str:
    """A name as the shim gives it."""
    return f"20261121T{number:06d}-{pid}"


def make_run(root: Path, name: str, *stems: str, age: float = 3600) -> Path:
    path = root / name
    path.mkdir(parents=True)
    for stem in stems:
        (path / f"{stem}.json").write_text("{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


def prune(root: Path, keep: int = 0) -> list[str]:
    with _files.opened(root) as descriptor:
        _prune.prune(descriptor, keep, seconds=60)
    return sorted(path.name for path in root.iterdir())


def is_running(file: Path) -> bool:
    with _files.opened(file.parent) as descriptor:
        return _liveness.is_running(descriptor, file.stem, os.getuid())


def own_stem() -> str:
    return next(_rundir.stems())


ALIVE, DEAD, OTHER = run_name(1), run_name(2), run_name(3)


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_runs_without_a_living_process_are_pruned_and_others_kept(root):
    make_run(root, ALIVE, own_stem())
    make_run(root, DEAD, f"{dead_pid()}-1")
    assert prune(root) == [ALIVE]


def test_a_process_id_that_was_used_again_is_not_the_old_process(root):
    make_run(root, DEAD, f"{os.getpid()}-{_liveness.start_time(os.getpid()) + 1}")
    assert prune(root) == []


HOLD = """
import os, sys, time
from pathlib import Path
from ascend_patch import _calls
from ascend_patch._calls import Counters
if "not mapped" in sys.argv:
    _calls.KEEP_PROMISES = ()
if "no mapping at all" in sys.argv:
    _calls.KEEP_PROMISES = ()
    def mmap(*_, **__):
        raise OSError("no such device")
    _calls.mmap.mmap = mmap
counters = Counters()
counters.share(Path(sys.argv[1]))
if "fork" in sys.argv and os.fork() == 0:
    counters.reset()  # as the shim does in a forked child
    print(os.getpid(), flush=True)
elif "fork" not in sys.argv:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def hold(path: Path, *words: str) -> tuple[subprocess.Popen, int]:
    """A process that has made the file, and the process that says so: itself, or its child."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *words], stdout=subprocess.PIPE, text=True
    )
    return child, int(child.stdout.readline())


def test_a_run_of_another_container_is_kept_while_it_runs(root):
    """There its process has an id that nobody has here, or somebody else."""
    for name, pid in ((DEAD, dead_pid()), (OTHER, os.getpid())):
        run = make_run(root, name, f"{pid}-1")
        child, _ = hold(run / f"{pid}-1.calls")
        try:
            os.utime(run, (time.time() - 3600,) * 2)
            assert prune(root) == [name]
            assert is_running(run / f"{pid}-1.json")
        finally:
            child.kill()
            child.wait()
        assert not is_running(run / f"{pid}-1.json")
        assert prune(root) == []


def test_a_process_that_has_our_id_and_start_by_chance_keeps_no_run(root):
    """After a reboot, or where the system does not tell when a process started."""
    for stem in (own_stem(), f"{os.getpid()}-0"):
        run = make_run(root, DEAD, stem)
        (run / f"{stem}.calls").write_bytes(bytes(8))
        os.utime(run, (time.time() - 3600,) * 2)
        assert prune(root) == []


@pytest.mark.parametrize("how", ["mapped", "not mapped", "no mapping at all"])
def test_a_forked_child_does_not_keep_its_parent_in_the_status(root, how):
    run = make_run(root, DEAD, "1-1")
    child, grandchild = hold(run / "1-1.calls", "fork", how)
    try:
        assert grandchild != child.pid
        assert is_running(run / "1-1.json")
        child.kill()
        child.wait()
        assert not is_running(run / "1-1.json")
        os.kill(grandchild, 0)
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.kill()
        child.wait()


def test_asking_twice_at_once_takes_nobody_for_running(root):
    run = make_run(root, DEAD, "1-1")
    path = run / "1-1.calls"
    path.write_bytes(bytes(8))
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with _files.opened(run) as directory:
            assert _calls.is_held(path.name, directory, None) is False
            assert _calls.is_held("2-2.calls", directory, None) is None


def test_a_zombie_is_not_alive(root):
    child = subprocess.Popen(["true"])
    started = _liveness.start_time(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert _liveness.is_alive(child.pid, started) is False
    child.wait()


def test_a_run_that_is_being_made_is_not_pruned(root):
    make_run(root, OTHER, age=0)
    make_run(root, DEAD)
    assert prune(root) == [OTHER]


def test_the_newest_ended_runs_are_kept(root):
    for age in (1000, 2000, 3000):
        make_run(root, run_name(age), f"{dead_pid()}-1", age=age)
    assert prune(root, keep=1) == [run_name(1000)]


@pytest.mark.parametrize("stem", ["99999999999999999999-1", "²-1", "x-y", "1", "", "0-0", "1-1-x"])
def test_a_run_that_holds_other_names_than_the_shims_is_left_alone(root, stem):
    make_run(root, DEAD, "1-1", stem)
    # No process has id 0, which to kill(2) is one's own group.
    assert prune(root) == ([] if stem == "0-0" else [DEAD])


def test_a_link_is_not_followed(root, tmp_path):
    target = make_run(tmp_path, DEAD, "1-1")
    root.mkdir(parents=True)
    (root / OTHER).symlink_to(target)
    assert prune(root) == [OTHER]
    assert [path.name for path in target.iterdir()] == ["1-1.json"]


def test_the_start_time_survives_an_odd_command_name(tmp_path):
    link = tmp_path / "a) b (c"
    link.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(link), "30"])
    try:
        assert _liveness.start_time(child.pid) >= _liveness.start_time(os.getpid()) > 0
    finally:
        child.kill()
        child.wait()
