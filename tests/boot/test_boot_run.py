"""`ascend-patch run -- CMD`: the door of a process that has no shim installed."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest
from house import MARK, PROBE, House, room, start

from ascend_patch import _run

LAUNCH = "import sys; from ascend_patch import _run\n"
LAUNCH += "try: _run.run(sys.argv[1:])\nexcept _run.RunError as e: print(e); sys.exit(e.status)\n"


@pytest.fixture
def run(furnished, tmp_path):
    """Start `ascend-patch run` in the environment that has the shim."""

    def start_it(*words, **environ):
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environ}
        return start([str(furnished.python), "-c", LAUNCH, *words], **cache)

    return start_it


@pytest.fixture
def other(furnished, tmp_path):
    """An interpreter with nothing of ours in it."""
    return House.build(tmp_path / "other", os.path.realpath(furnished.python))


def said(done):
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_the_door_is_open_in_another_interpreter(run, other):
    found = said(run("--", str(other.python), "-c", PROBE))
    assert found["doors"] == ["run"]
    assert (found["value"], found["armed"], found["others"]) == ("all", 1, [])


def test_it_is_open_in_the_children_too(run, other):
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    assert said(run(str(other.python), "-c", code, PROBE))["doors"] == ["run"]


def test_beside_an_installed_shim_it_is_one_copy(run, furnished):
    found = said(run("--", str(furnished.python), "-c", PROBE))
    assert (found["doors"], found["armed"], found["others"]) == (["pth", "run"], 1, [])


def test_our_site_packages_are_not_exposed(run, other, furnished, checkout):
    (furnished.site / "secret.py").write_text("")
    code = (
        "import importlib.util as u, sys, ascend_patch.kernels\n"
        "print([u.find_spec(n) for n in ('secret', 'kernels', 'tests', 'setup')], sys.path)"
    )
    done = run("--", str(other.python), "-c", code)
    assert done.stdout.startswith("[None, None, None, None] ")
    assert str(furnished.site) not in done.stdout


def test_from_a_checkout_no_folder_of_it_is_exposed(other, checkout, tmp_path):
    folder = environment_folder(checkout, other, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["ascend_patch", "sitecustomize.py"]


def environment_folder(checkout, house, tmp_path):
    code = "from ascend_patch import _run; print(_run.door_folder())"
    done = house.run("-c", code, path=(checkout,), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_it_chains_to_the_users_own(run, other, tmp_path):
    user = room(tmp_path / "user", MARK.format("user"))
    found = said(run("--", str(other.python), "-c", PROBE, PYTHONPATH=str(user)))
    assert (found["doors"], found["marks"]) == (["run"], ["user"])


def test_a_selection_is_kept(run, other):
    found = said(run("--", str(other.python), "-c", PROBE, ASCEND_PATCHES="rotary"))
    assert found["value"] == "rotary"


def test_off_is_kept_and_said(run, other):
    done = run("--", str(other.python), "-c", PROBE, ASCEND_PATCHES="none")
    assert said(done)["doors"] == []
    assert "ASCEND_PATCHES=none means off" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ((), 2, "no command is given"),
        (("--",), 2, "no command is given"),
        (("no-such-command",), 127, "no-such-command cannot be started: it is not on PATH"),
        (("/no/such",), 127, "/no/such cannot be started: there is no such file"),
        (("/",), 126, "/ cannot be started: Permission denied"),
        (("a\0b",), 126, "cannot be started: .*embedded null"),
    ],
)
def test_what_cannot_be_started_is_a_sentence(words, status, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(_run.RunError, match=sentence) as caught:
        _run.run(list(words))
    assert caught.value.status == status


def test_a_script_without_the_bit_has_a_hint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = tmp_path / "serve.py"
    script.write_text("")
    with pytest.raises(_run.RunError, match="write: ascend-patch run -- python"):
        _run.run([str(script)])


@pytest.mark.parametrize(
    ("words", "switch"),
    [
        (["python", "-I", "x.py"], "-I"),
        (["/usr/bin/python3.11", "-u", "-sE", "x.py"], "-sE"),
        (["python3", "-S"], "-S"),
        (["python", "x.py", "-I"], None),
        (["python", "-m", "pkg", "-I"], None),
        (["python", "-mISE"], None),
        (["python", "-WIgnoreE", "x.py"], None),
        (["python", "-X", "importtime", "x.py"], None),
        (["vllm", "serve", "-E"], None),
        (["python"], None),
    ],
)
def test_switches_that_keep_the_door_closed(words, switch):
    assert _run._closing_switch(words) == switch


def test_a_closing_switch_is_said(run, other):
    done = run("--", str(other.python), "-I", "-c", PROBE)
    assert said(done)["doors"] == []
    assert "-I makes Python ignore PYTHONPATH" in done.stderr


def test_the_environment_is_built_in_order():
    before = {"PYTHONPATH": f"/a{os.pathsep}{os.pathsep}/door{os.pathsep}/b", "X": "1"}
    after = _run.environment_of(before, Path("/door"))
    assert after["PYTHONPATH"].split(os.pathsep) == ["/door", "/a", "/b"]
    assert (after["ASCEND_PATCHES"], after["X"]) == ("all", "1")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_made_once_and_private(cache):
    folder = _run.door_folder()
    assert folder.parent == cache / "cache" / "ascend-patch"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = folder.stat().st_ino
    assert _run.door_folder() == folder
    assert folder.stat().st_ino == made
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_folder_is_made_again(cache):
    folder = _run.door_folder()
    (folder / "ascend_patch").unlink()
    (folder / "ascend_patch").symlink_to("/nowhere")
    _run.door_folder()
    assert (folder / "ascend_patch" / "_run.py").is_file()


def test_a_folder_that_others_can_write_is_not_used(cache):
    folder = _run.door_folder()
    folder.chmod(0o777)
    elsewhere = _run.door_folder()
    assert elsewhere != folder
    assert elsewhere.is_dir()


def test_without_a_home_it_is_in_the_temporary_directory(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _run.door_folder().is_relative_to(cache / f"ascend-patch-{os.getuid()}")


def test_nowhere_to_write_is_a_sentence(cache, monkeypatch):
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    with pytest.raises(_run.RunError, match="set XDG_CACHE_HOME"):
        _run.door_folder()


def test_a_replaced_sitecustomize_is_a_sentence(furnished):
    room(furnished.site, "# another package's\n")
    done = start([str(furnished.python), "-c", LAUNCH, "true"])
    assert done.returncode == 126
    assert "another package has replaced" in done.stdout
