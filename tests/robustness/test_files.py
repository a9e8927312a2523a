"""What the shim makes, removes and believes in the directory of its status files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakehost import REPOSITORY
from status_site import (
    DAY,
    DEMO,
    SERVER,
    cli,
    ended,
    environment,
    in_mounts,
    make_old,
    needs_namespaces,
    python,
    runs,
    server,
    start,
    status,
)
from tally import tally

OWN = f"ascend-patch-{os.getuid()}"
RUN = "20250101T000000-{}"


def tree(folder: Path) -> dict[str, str]:
    """Everything in a folder: path, kind, content; nothing is followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "directory" if path.is_dir() else path.read_text()
    return found


def lay(folder: Path, elsewhere: Path) -> None:
    """What a user may have in a directory: some of it has names of runs."""
    for name in (".ssh", "models", "models/qwen", RUN.format(1), RUN.format(2), "empty"):
        (folder / name).mkdir(parents=True)
    (folder / ".ssh/id_ed25519").write_text("the key")
    (folder / "models/qwen/model.safetensors").write_text("weights")
    (folder / RUN.format(1) / "notes.txt").write_text("the user's own")
    (folder / RUN.format(2) / "1-1.json").mkdir()
    (folder / RUN.format(2) / "1-1.json/deep.txt").write_text("deep")
    (elsewhere / "1-1.json").write_text("{}")
    (folder / RUN.format(3)).symlink_to(elsewhere)
    (folder / RUN.format(4)).mkdir()
    (folder / RUN.format(4) / "1-1.json").symlink_to(elsewhere / "1-1.json")
    for path in folder.iterdir():
        if not path.is_symlink():
            make_old(path)


@pytest.mark.fault("status_dir_deletes_directories")
def test_what_a_user_has_in_the_status_directory_stays(host, tmp_path):
    host.patches(DEMO)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lay(host.status, elsewhere)
    # Also in the shim's own directory nothing is removed that the shim has not made.
    lay(host.status / OWN, elsewhere / ".." / "elsewhere")
    before = tree(host.status), tree(elsewhere)
    start(host)
    after = {path: what for path, what in tree(host.status).items() if path in before[0]}
    assert (after, tree(elsewhere)) == before
    # The control: an old run of the shim's own, beyond those that are kept, goes.
    old = [host.status / OWN / RUN.format(f"5{number}") for number in range(12)]
    for path in old:
        path.mkdir()
        (path / "4194304-1.json").write_text("{}")
        make_old(path)
    start(host)
    assert len([path for path in old if path.exists()]) < 12
    after = {path: what for path, what in tree(host.status).items() if path in before[0]}
    assert (after, tree(elsewhere)) == before


NAME = "v启动大模型.py"


@pytest.mark.fault("process_name_is_not_utf8")
@pytest.mark.parametrize("how", ["a script with a shebang", "a name that a library sets"])
def test_a_process_name_that_is_cut_in_a_character_stops_nothing(host, how):
    host.patches(DEMO)
    says = "print(open('/proc/self/comm', 'rb').read().strip())\n"
    if how.startswith("a script"):
        script = host.folder / NAME
        script.write_text(f"#!{sys.executable}\nimport vllm.ops\n{says}", encoding="utf-8")
        script.chmod(0o700)
        done = ended([str(script)], env=host.environment(PYTHONUTF8="1"))
    else:
        sets = f"open('/proc/self/comm', 'wb').write({'Qwen通义千问'.encode()!r})\n"
        done = ended(
            [sys.executable, "-c", f"{sets}import vllm.ops\n{says}"], env=host.environment()
        )
    assert done.returncode == 0, done.stderr
    with pytest.raises(UnicodeDecodeError):
        eval(done.stdout).decode()
    assert len(runs(host)) == 1


@pytest.mark.fault("process_name_is_not_utf8")
def test_status_beside_a_process_with_such_a_name(host):
    host.patches(DEMO)
    sets = f"open('/proc/self/comm', 'wb').write({'Qwen通义千问'.encode()!r})\n"
    with server(host, code=SERVER.replace("print", f"{sets}print")):
        # Without its counters a process is known by its id and start.
        (run,) = runs(host)
        for file in run.glob("*.calls"):
            file.unlink()
        (found,) = status(host)["runs"]
        assert [process["alive"] for process in found["processes"]] == [True]


def stale(root: Path, many: int) -> None:
    """Runs that ended, of processes that cannot be."""
    for number in range(many):
        path = root / RUN.format(number)
        path.mkdir(parents=True)
        (path / "4194304-1.json").write_text("{}")
        (path / "4194304-1.calls").write_bytes(bytes(4096))
        make_old(path)


CPU_TIME = (
    "import json, time\nbefore = time.process_time(), time.monotonic()\nimport vllm.ops\n"
    "print(json.dumps([time.process_time() - before[0], time.monotonic() - before[1]]))\n"
)


@pytest.fixture
def quick_disk(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: some disks take a minute for 20,000 directories."""
    in_memory = Path("/dev/shm")
    place = in_memory if os.access(in_memory, os.W_OK) else tmp_path
    folder = Path(tempfile.mkdtemp(dir=place))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.fault("many_stale_runs")
def test_ten_thousand_ended_runs_cost_50_ms(host, quick_disk):
    host.patches(DEMO)
    host.status = quick_disk / "status"
    without = min(json.loads(start(host, CPU_TIME))[0] for _ in range(3))
    places = host.status, host.status / OWN
    for _ in range(3):
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
            stale(place, 10_000)
        cpu, wall = json.loads(start(host, CPU_TIME))
        left = len([path for path in places[1].iterdir() if path.name.startswith("2025")])
        if cpu - without <= 0.05:
            break
    assert cpu - without <= 0.05
    # The control: there was something to remove, it began, and it was not finished.
    assert 100 < left < 10_000
    note = f"{1000 * (cpu - without):.1f} ms of CPU time more, {wall:.3f} s in all, {left} left"
    tally("stale runs in `import vllm`", tried=10_000, unit="runs", note=note)


def test_what_one_start_leaves_the_next_ones_remove(host):
    host.patches(DEMO)
    stale(host.status / OWN, 60)
    for _ in range(50):
        start(host)
        left = [path for path in (host.status / OWN).iterdir() if path.name.startswith("2025")]
        if len(left) <= 10:
            return
    pytest.fail(f"{len(left)} are left after 50 starts")


NAMESPACES = ("--pid", "--fork", "--kill-child")


@pytest.mark.fault("pid_namespaces_share_a_file")
@pytest.mark.parametrize("joined", [True, False], ids=["one run", "a run each"])
def test_two_pid_namespaces_never_share_a_file(host, joined):
    """Each process has id 1, and /proc, which is that of the test, gives each one start time."""
    needs_namespaces(*NAMESPACES)
    host.patches(DEMO)
    name = RUN.format(1)
    if joined:
        for place in (host.status, host.status / OWN):
            (place / name).mkdir(parents=True)
    more = {"ASCEND_PATCHES_RUN": name} if joined else {}
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server(host, "unshare", *NAMESPACES, **more))
        found = status(host)["runs"]
        processes = [process for run in found for process in run["processes"]]
        assert [process["pid"] for process in processes] == [1] * 4
        assert all(process["alive"] for process in processes)
        assert len(found) == (1 if joined else 4)
    # The control: they are known to run by more than their id, which is that of init here.
    assert not any(run["alive"] for run in status(host)["runs"])


@pytest.mark.fault("run_from_the_future")
def test_a_run_from_the_future_does_not_hide_the_newest(host):
    host.patches(DEMO)
    start(host)
    (first,) = runs(host)
    future = shutil.copytree(first, first.with_name("20991231T235959-4194304"))
    (file,) = future.glob("*.json")
    record = json.loads(file.read_text()) | {"started": time.time() + 365 * DAY}
    file.write_text(json.dumps(record))
    make_old(first)
    make_old(future, -365 * DAY)
    start(host)
    (newest,) = set(runs(host)) - {first, future}
    shown = [line for line in cli(host, "status").stdout.splitlines() if line.startswith("run ")]
    assert [line.split(",")[0] for line in shown] == [f"run {newest.name}: ended"]
    everything = cli(host, "status", "--all").stdout
    assert f"run {future.name}: ended, started in the future" in everything


PLUGINS = "def load_general_plugins():\n    pass\n"
PROBED = (
    "import fakepatches\nfrom ascend_patch import _doctor, _versions\n"
    "for found in _doctor._applied(_versions.find()):\n    print(found.level, found.text)\n"
)


@pytest.mark.fault("doctor_leaves_a_run")
def test_doctor_leaves_no_run(host):
    host.patches(DEMO)
    host.write("vllm.plugins", PLUGINS)
    done = ended([sys.executable, "-c", PROBED], env=host.environment())
    # The control: it has imported vLLM in a process of its own, with the patch.
    assert "ok in a process of its own: applied" in done.stdout, done.stdout + done.stderr
    assert runs(host) == []
    assert "no status file" not in done.stdout


@pytest.mark.fault("one_ended_run_is_kept")
def test_a_crashed_servers_record_survives_nine_starts(host):
    host.patches(DEMO)
    with server(host):
        (crashed,) = runs(host)
    for _ in range(9):
        start(host)
    kept = {run["id"]: run for run in status(host, "--all")["runs"]}
    assert len(kept) == 10
    text = cli(host, "status", "--all").stdout
    assert crashed.name in kept
    assert "front end (killed)" in text[text.index(crashed.name) :]
    # The control: there is an end to it.
    for _ in range(3):
        start(host)
    assert len(runs(host)) == 11
    assert crashed not in runs(host)


@pytest.mark.fault("status_without_runs")
def test_status_without_runs_has_one_exit_status(host):
    done = [cli(host, "status", *words) for words in ((), ("--json",), ("--all",))]
    assert [one.returncode for one in done] == [1, 1, 1]
    assert json.loads(done[1].stdout)["runs"] == []
    host.patches(DEMO)
    start(host)
    assert [cli(host, "status", *words).returncode for words in ((), ("--json",))] == [0, 0]


@pytest.mark.fault("no_writable_temporary_directory")
@pytest.mark.parametrize("words", ["status", "status --json", "doctor --quick"])
def test_without_a_place_for_files_there_is_one_sentence(host, words):
    host.patches(DEMO)
    places = {"site": host.site, "repository": REPOSITORY}
    binds = "".join(f"mkdir /mnt/{to}; mount --bind {of} /mnt/{to}; " for to, of in places.items())
    hides = "".join(f"mount -t tmpfs -o ro none {place}; " for place in ("/tmp", "/var/tmp"))
    command = f"{python('from ascend_patch.cli import main; raise SystemExit(main())')} {words}"
    none = dict.fromkeys(("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "TMP", "ASCEND_PATCHES_STATUS_DIR"))
    # Where nothing can be written either, for tempfile would take it.
    done = in_mounts(
        f"mount -t tmpfs none /mnt; {binds} {hides} cd /proc; {command}",
        env=environment(host, PYTHONPATH="/mnt/site:/mnt/repository", **none),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert said.count("there is no place for status files: /tmp nor /var/tmp can be written") == 1
    assert "set ASCEND_PATCHES_STATUS_DIR to" in said


HELPER = (
    "import subprocess, sys, vllm.ops\n"
    "code = 'import vllm.ops, os, sys; sys.stdout.flush(); {end}'\n"
    "subprocess.run([sys.executable, '-c', code])\n"
    "subprocess.run([sys.executable, '-m', 'ascend_patch', 'status'])\n"
)


@pytest.mark.fault("helper_process_looks_crashed")
def test_a_helper_process_that_ended_is_no_front_end_that_crashed(host):
    host.patches(DEMO)
    lines = host.run(HELPER.format(end="pass")).out.splitlines()
    front = [line for line in lines if line.lstrip().startswith("front end")]
    assert len(front) == 1
    assert "(" not in front[0]
    assert [line for line in lines if "has done its work and ended" in line]
    # The control: one that did not end by itself is shown.
    shutil.rmtree(host.status)
    lines = host.run(HELPER.format(end="os.kill(os.getpid(), 9)")).out.splitlines()
    front = [line for line in lines if line.lstrip().startswith("front end")]
    assert ["(killed)" in line for line in front] == [False, True]


CHILDREN = (
    "import multiprocessing, os, sys\n"
    "def work(kills):\n    import vllm.ops\n    kills and os.kill(os.getpid(), 9)\n"
    "if __name__ == '__main__':\n"
    "    {first}\n"
    "    context = multiprocessing.get_context(sys.argv[1])\n"
    "    children = [context.Process(target=work, args=(n == 1,)) for n in (0, 1)]\n"
    "    [child.start() for child in children], [child.join() for child in children]\n"
)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("first", ["import vllm.ops", "pass"])
def test_each_process_that_ends_by_itself_says_so(host, method, first):
    host.patches(DEMO)
    script = host.folder / "children.py"
    script.write_text(CHILDREN.format(first=first))
    done = ended([sys.executable, str(script), method], env=host.environment(), cwd=host.folder)
    assert done.returncode == 0, done.stderr
    processes = [process for run in status(host, "--all")["runs"] for process in run["processes"]]
    by_itself = {process["role"]: process["ended"] is not None for process in processes}
    children = [value for role, value in sorted(by_itself.items()) if role != "front end"]
    assert children == [True, False]
    assert by_itself.get("front end", True)


@pytest.mark.fault("relative_status_dir")
@pytest.mark.parametrize("value", ["cpu", "0", "./status", "~/status"])
def test_a_relative_status_directory_is_refused(host, value):
    host.patches(DEMO)
    more = {"ASCEND_PATCHES_STATUS_DIR": value}
    before = sorted(os.listdir(host.folder))
    found = host.run("import vllm.ops; print(vllm.ops.f(1))", **more)
    assert set(os.listdir(host.folder)) - set(before) <= {"script.py"}
    sentence = f"ASCEND_PATCHES_STATUS_DIR={value} is a relative path"
    assert found.out == "['ours', 'f', 1]\n"
    assert found.err.count(sentence) == 1
    for words in (("status",), ("status", "--json")):
        done = cli(host, *words, more=more)
        assert done.returncode == 1
        assert sentence in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert sentence in json.loads(cli(host, "doctor", "--quick", "--json", more=more).stdout)[
        "findings"
    ][-1]["text"].replace("\n", " ")
    assert set(os.listdir(host.folder)) - set(before) <= {"script.py"}


WRITES = (
    "import time, vllm.ops\nfrom ascend_patch import _runtime\nstate = _runtime.current().state\n"
    "print('ready', flush=True)\n"
    "state.facts['versions'] = {str(i): 'x' for i in range(9999)}\n"
    "while True:\n    state.write()\n"
)


def test_a_process_killed_while_it_writes_leaves_a_whole_record(host):
    host.patches(DEMO)
    for _ in range(25):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITES],
            env=host.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(int.from_bytes(os.urandom(1), "big") / 5000)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
    found = status(host, "--all")
    assert found.get("problems", []) == []
    assert len(found["runs"]) == 11
    assert all(len(run["processes"]) == 1 for run in found["runs"])
    tally("status files: SIGKILL in mid-write", tried=25, unit="processes")


def test_what_replaced_itself_has_files_of_its_own(host):
    """The same process and start time: exec, as launchers do."""
    host.patches(DEMO)
    script = (
        "import os, sys, vllm.ops\nvllm.ops.f(1)\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {SERVER!r}])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env=host.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        (run,) = status(host)["runs"]
        assert [process["pid"] for process in run["processes"]] == [child.pid] * 2
        assert [process["alive"] for process in run["processes"]] == [False, True]
    finally:
        child.kill()
        child.communicate()


def ended_runs(root: Path, many: int) -> None:
    """So many runs of the shim's own that a start removes the oldest ones."""
    for number in range(many):
        path = root / RUN.format(f"7{number}")
        path.mkdir(parents=True)
        (path / "4194304-1.json").write_text("{}")
        make_old(path)


def test_a_link_in_the_place_of_the_directory_is_not_followed(host, tmp_path):
    host.patches(DEMO)
    precious = tmp_path / "precious"
    ended_runs(precious, 15)
    host.status.mkdir()
    (host.status / OWN).symlink_to(precious)
    before = tree(precious)
    found = ended([sys.executable, "-c", "import vllm.ops"], env=host.environment())
    assert found.returncode == 0
    assert found.stderr.count("no status file: ") == 1
    assert tree(precious) == before
    assert cli(host, "status").returncode == 1
    # The control: what the link leads to would have been pruned.
    (host.status / OWN).unlink()
    precious.rename(host.status / OWN)
    start(host)
    assert len(list((host.status / OWN).iterdir())) == 11


def test_what_is_mounted_below_the_directory_stays(host):
    host.patches(DEMO)
    root = host.status / OWN
    ended_runs(root, 15)
    mounted = root / RUN.format(1)
    mounted.mkdir()
    script = (
        f"mount -t tmpfs none {mounted}; echo {{}} > {mounted}/4194304-1.json; "
        f"touch -d '2020-01-01' {mounted}; {python('import vllm.ops')}; ls {mounted}; ls {root}"
    )
    done = in_mounts(script, env=host.environment(), cwd=host.folder)
    first, *others = done.stdout.split()
    assert first == "4194304-1.json", done.stderr
    # The control: others of the same age and content went.
    assert len([name for name in others if name.startswith("20250101T000000-7")]) == 10


def test_a_directory_that_others_can_write_is_theirs_no_more(host):
    host.patches(DEMO)
    root = host.status / OWN
    root.mkdir(parents=True)
    root.chmod(0o777)
    done = ended(
        [sys.executable, "-c", "import os; os.umask(0o077); import vllm.ops"],
        env=host.environment(),
    )
    assert done.returncode == 0
    assert root.stat().st_mode & 0o777 == 0o755
    ((file, *_),) = [list(run.iterdir()) for run in runs(host)]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
