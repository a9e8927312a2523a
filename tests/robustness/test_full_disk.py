"""A disk without space, before the shim starts or while it runs, ends nobody's server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from status_site import DEMO, in_mounts, python

OWN = f"ascend-patch-{os.getuid()}"
RUN = "20250101T000000-1"
SERVES = "import vllm.ops\nprint(vllm.ops.f(1))\n"
# What a file that is mapped before it has its space does on a full disk.
SPARSE = (
    "import os\nfrom ascend_patch import _calls\n"
    "_calls._reserve = lambda descriptor: os.ftruncate(descriptor, 4096)\n"
)
DIES = 128 + signal.SIGBUS


def mounted(kind: str, place: Path, image: Path) -> str:
    """Shell commands that mount a small file system of this kind there."""
    if kind == "tmpfs":
        return f"mount -t tmpfs -o size=1m none {place}; "
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is missing")
    image.write_bytes(bytes(4 << 20))
    subprocess.run([f"mkfs.{kind}", "-q", "-F", "-m", "0", image], check=True, capture_output=True)
    try:
        in_mounts(f"mount -o loop {image} {place}").check_returncode()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a mount of {kind} is missing: {error.stderr}")
    return f"mount -o loop {image} {place}; "


def fill(place: Path) -> str:
    """A shell command that leaves no space there."""
    return f"dd if=/dev/zero of={place}/fill bs=4k 2>/dev/null || true; sync -f {place}/fill; "


def on_disk(host, kind: str, code: str, *, full: bool) -> subprocess.CompletedProcess[str]:
    """Run Python source with its status directory on such a file system.

    The directory of the run is there, since a full ext4 has no space for one.
    """
    host.patches(DEMO)
    host.status.mkdir(exist_ok=True)
    script = mounted(kind, host.status, host.folder / "image")
    script += f"mkdir -p {host.status}/{OWN}/{RUN} {host.status}/{RUN}; "
    script += fill(host.status) if full else ""
    script += f"{python(code)} || status=$?; find {host.status} -name '*-*.*'; exit $status"
    return in_mounts(script, env=host.environment(ASCEND_PATCHES_RUN=RUN), cwd=host.folder)


@pytest.mark.fault("full_disk_kills_the_server")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_costs_the_status_file_alone(host, kind):
    done = on_disk(host, kind, SERVES, full=True)
    assert (done.returncode, done.stdout) == (0, "['ours', 'f', 1]\n"), done.stderr
    assert done.stderr.count("no status file: ") == 1
    assert "No space left on device" in done.stderr
    # The controls: with space there are both files; a sparse file would have ended the process.
    done = on_disk(host, kind, SERVES, full=False)
    assert "no status file" not in done.stderr
    assert sorted(Path(line).suffix for line in done.stdout.splitlines()[1:]) == [".calls", ".json"]
    assert on_disk(host, kind, SPARSE + SERVES, full=True).returncode == DIES


FILLED_LATER = """
import os, sys, vllm.ops
from ascend_patch import _calls, _runtime
state = _runtime.current().state
try:
    with open(sys.argv[1] + "/fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
for number in range(_calls.SLOTS - 1):
    state.counters.counter(f"kernel/{number}")()
for _ in range(1000):
    vllm.ops.f(1)
state.facts["versions"] = {str(number): "more" for number in range(10_000)}
state.write()
print(state.counters.kept, state.problems)
os.unlink(sys.argv[1] + "/fill")
state.write()
"""


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_gets_full_while_the_server_runs(host, kind):
    code = FILLED_LATER.replace("sys.argv[1]", repr(str(host.status)))
    done = on_disk(host, kind, code, full=False)
    said, *files = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    where = host.status / OWN / RUN
    assert said == f"mapped ['no status file: {where}: No space left on device']"
    # It is written again once there is space, and nothing of the attempt is left.
    assert sorted(Path(line).suffix for line in files) == [".calls", ".json"]


OVERLAY = """
import os, sys, time, vllm.ops
from ascend_patch import _runtime
from pathlib import Path
state = _runtime.current().state
(calls,) = Path(os.environ["ASCEND_PATCHES_STATUS_DIR"]).rglob("*.calls")
vllm.ops.f(1)
time.sleep(0.2)
vllm.ops.f(1)
count = int.from_bytes(calls.read_bytes()[:8], "little")
print(state.counters.kept, state.counters.file_system, count, flush=True)
os.system(f"{sys.executable} -m ascend_patch status")
os.truncate(calls, 0)
time.sleep(0.2)
vllm.ops.f(1)
print(state.counters.kept, calls.stat().st_size)
"""


def test_a_file_system_that_does_not_say_what_lies_below_is_not_mapped(host):
    host.patches(DEMO)
    host.status.mkdir()
    place = host.folder / "layers"
    place.mkdir()
    script = (
        f"mount -t tmpfs none {place}; mkdir {place}/lower {place}/upper {place}/work; "
        f"mount -t overlay -o lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work "
        f"none {host.status} || exit 77; {python(OVERLAY)}"
    )
    done = in_mounts(script, env=host.environment(), cwd=host.folder)
    if done.returncode == 77:
        pytest.skip("a mount of overlay is missing")
    first, *report, last = done.stdout.splitlines()
    assert first == "written overlay 2", done.stderr
    assert last == "written 4096"
    assert any("overlay keeps no space for a mapping" in line for line in report)
    (row,) = [line for line in report if line.lstrip().startswith("front end ")]
    assert row.endswith("  2  1 of 1 applied")
