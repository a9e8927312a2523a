"""Ways to start Python: it always starts, and `doors` says which way it came in."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import MARK, PROBE, House, room, start

INSTALLED = ["pth"]
OURS = ["sitecustomize"]
SWITCHES = {
    # switches: doors of the drop-in, doors of an installed shim
    (): (OURS, INSTALLED),
    ("-S",): ([], []),
    ("-E",): ([], INSTALLED),
    ("-I",): ([], INSTALLED),
    ("-s",): (OURS, INSTALLED),
    ("-O",): (OURS, INSTALLED),
    ("-OO",): (OURS, INSTALLED),
    ("-B",): (OURS, INSTALLED),
    ("-bb",): (OURS, INSTALLED),
    ("-Werror",): (OURS, INSTALLED),
    ("-X", "dev"): (OURS, INSTALLED),
    ("-X", "importtime"): (OURS, INSTALLED),
    ("-X", "frozen_modules=off"): (OURS, INSTALLED),
    ("-X", "utf8"): (OURS, INSTALLED),
    ("-X", "warn_default_encoding", "-Werror"): (OURS, INSTALLED),
}


def pythons():
    """(interpreter, X.Y) of each CPython on PATH, of the system and of pyenv, virtual ones not."""
    paths = [shutil.which(f"python3.{minor}") for minor in range(10, 15)]
    paths += map(str, Path("/usr/bin").glob("python3.1[0-9]"))
    paths += map(str, Path.home().glob(".pyenv/versions/3.*/bin/python"))
    code = "import sys; print(sys._base_executable, '%d.%d' % sys.version_info[:2])"
    found = set()
    for path in filter(None, paths):
        done = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            base, version = done.stdout.split()
            found.add((os.path.realpath(base), version))
    return sorted(found)


@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
@pytest.mark.parametrize("form", ["drop-in", "installed"])
def test_switches(form, switches, house, shim, checkout):
    options = {"path": (checkout,)} if form == "drop-in" else {}
    if form == "installed":
        house.install(shim)
    said = house.boot(*switches, **options)
    expected = SWITCHES[switches][form == "installed"]
    assert said["doors"] == expected
    assert said["armed"] == bool(expected)
    if "importtime" not in switches:
        assert said["stderr"] == ""


@pytest.mark.slow
def test_every_python_here(tmp_path, shim, checkout):
    for number, (base, version) in enumerate(pythons()):
        house = House.build(tmp_path / str(number), base, version)
        said = house.boot(path=(checkout,))
        assert said["stderr"] == ""
        assert house.boot(path=(checkout,), patches="")["doors"] == []
        if int(version.partition(".")[2]) < 10:
            # Not for us, but started by a server that is: it must not notice.
            assert said["doors"] == [], base
            continue
        assert said["doors"] == OURS, base
        house.install(shim)
        said = house.boot()
        assert said["doors"] == INSTALLED, base
        assert said["stderr"] == ""
    assert pythons(), "no interpreter was found"


@pytest.mark.slow
def test_the_system_python_keeps_its_own_sitecustomize(checkout):
    own = sorted(Path("/usr/lib").glob("python3.*/sitecustomize.py"))
    if not own:
        pytest.skip("no system Python with a sitecustomize of its own is here")
    python = f"/usr/bin/{own[0].parent.name}"
    done = start([python, "-c", PROBE], path=(checkout,), ASCEND_PATCHES="all")
    said = ast.literal_eval(done.stdout.splitlines()[-1])
    assert (said["doors"], said["armed"]) == (OURS, 1)
    assert said["sitecustomize"] == str(own[0])


def test_a_venv_in_a_venv_has_no_door(furnished, tmp_path):
    inner = House.build(tmp_path / "inner", str(furnished.python))
    assert inner.boot()["doors"] == []


def test_a_venv_with_system_site_packages(furnished, tmp_path, shim):
    """The outer environment's packages are not the system's: the inner one has its own."""
    inner = House.build(tmp_path / "inner", str(furnished.python))
    (tmp_path / "inner" / "pyvenv.cfg").open("a").write("include-system-site-packages = true\n")
    inner.install(shim)
    said = inner.boot()
    assert (said["doors"], said["armed"]) == (INSTALLED, 1)


def test_a_zipapp(house, checkout, tmp_path):
    app = tmp_path / "app.pyz"
    with zipfile.ZipFile(app, "w") as archive:
        archive.writestr("__main__.py", PROBE)
    done = house.run(str(app), path=(checkout,), ASCEND_PATCHES="all")
    assert ast.literal_eval(done.stdout.splitlines()[-1])["doors"] == OURS


@pytest.fixture
def zipped(shim, tmp_path):
    archive = tmp_path / "shim.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in shim.rglob("*"):
            if "__pycache__" not in path.parts:
                file.write(path, path.relative_to(shim))
    return archive


def test_a_zipped_shim(house, zipped, tmp_path):
    user = room(tmp_path / "user", MARK.format("user"))
    startup = zipped / "ascend_patch" / "startup"
    for path in ((startup, user), (zipped, startup, user)):
        said = house.boot(path=path)
        assert (said["doors"], said["armed"], said["marks"]) == (OURS, 1, ["user"])
        assert (said["others"], said["stderr"]) == ([], "")
        assert house.boot(path=path, patches="")["doors"] == []
        code = "import ascend_patch.kernels as k; print(k.__file__)"
        assert str(zipped) in house.run("-c", code, path=path).stdout


def test_a_zipped_shim_runs_commands(house, zipped):
    code = (
        f"import sys; from ascend_patch import _run\n_run.run([sys.executable, '-c', {PROBE!r}])\n"
    )
    done = house.run("-c", code, path=(zipped,), ASCEND_PATCHES="all")
    assert ast.literal_eval(done.stdout.splitlines()[-1])["doors"] == OURS


@pytest.mark.parametrize("patches", ["", "all"])
def test_read_only_site_packages(furnished, patches):
    folders = [furnished.site, *(p for p in furnished.site.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        said = furnished.boot(patches=patches, PYTHONDONTWRITEBYTECODE="")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert said["doors"] == (INSTALLED if patches else [])
    assert said["stderr"] == ""


@pytest.mark.parametrize("form", ["drop-in", "installed"])
def test_no_home_and_hardly_an_environment(form, house, shim, checkout):
    options = {"path": (checkout,)} if form == "drop-in" else {}
    if form == "installed":
        house.install(shim)
    assert house.boot(HOME="", PATH="", **options)["doors"]


def test_standard_streams_may_be_closed(furnished):
    code = f"exec {furnished.python} -c 'import sys; sys.exit(7)' <&- >&- 2>&-"
    done = start(["sh", "-c", code], ASCEND_PATCHES="all")
    assert done.returncode == 7


def test_the_working_directory_may_be_gone(furnished, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"cd {gone} && rmdir {gone} && exec {furnished.python} -c 'import sys; sys.exit(7)'"
    done = start(["sh", "-c", code], ASCEND_PATCHES="all")
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(method, house, checkout, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing as mp, sys\n"
        "def child():\n"
        "    boot = sys.modules['ascend_patch._bootstrap']\n"
        "    armed = sum(type(f).__module__ == 'ascend_patch._finder' for f in sys.meta_path)\n"
        "    print(boot.doors, armed, flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    process = mp.get_context({method!r}).Process(target=child)\n"
        "    process.start(); process.join(); sys.exit(process.exitcode)\n"
    )
    done = house.run(str(script), path=(checkout,), ASCEND_PATCHES="all")
    assert (done.returncode, done.stdout) == (0, "['sitecustomize'] 1\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="vm.overcommit and rlimits are Linux's")
def test_few_file_descriptors(furnished):
    done = start(
        ["sh", "-c", f"ulimit -n 8 && exec {furnished.python} -c 'import sys; sys.exit(7)'"],
        ASCEND_PATCHES="all",
    )
    assert done.returncode == 7, done.stderr
