"""`ascend-patch run -- CMD`: the door of a process that has no shim installed."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from house import MARK, PROBE, House, room, start

from ascend_patch import _run

LAUNCH = "import sys; from ascend_patch import _run\n"
LAUNCH += "try: _run.run(sys.argv[1:])\nexcept _run.RunError as e: print(e); sys.exit(e.status)\n"


@pytest.fixture
def run(furnished):
    """Start `ascend-patch run` in the environment that has the shim."""

    def start_it(*words, **environ):
        return start([str(furnished.python), "-c", LAUNCH, *words], **environ)

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
    assert found["doors"] == ["sitecustomize"]
    assert (found["value"], found["armed"], found["others"]) == ("all", 1, [])


def test_it_is_open_in_the_children_too(run, other):
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    assert said(run(str(other.python), "-c", code, PROBE))["doors"] == ["sitecustomize"]


def test_beside_an_installed_shim_it_is_one_copy(run, furnished):
    found = said(run("--", str(furnished.python), "-c", PROBE))
    assert (found["doors"], found["armed"], found["others"]) == (["pth", "sitecustomize"], 1, [])


def test_our_site_packages_are_not_exposed(run, other, furnished, checkout):
    (furnished.site / "secret.py").write_text("")
    code = (
        "import importlib.util as u, sys, ascend_patch.kernels\n"
        "print([u.find_spec(n) for n in ('secret', 'kernels', 'tests', 'setup')], sys.path)"
    )
    done = run("--", str(other.python), "-c", code)
    assert done.stdout.startswith("[None, None, None, None] ")
    assert f"{str(furnished.site)!r}" not in done.stdout


@pytest.mark.parametrize("patches", ["", "all"])
def test_from_a_checkout_no_folder_of_it_is_exposed(patches, other, checkout):
    code = (
        "import sys; from ascend_patch import _run; _run.run([sys.executable, '-c', sys.argv[1]])"
    )
    ask = (
        "import importlib.util as u, sys, ascend_patch.kernels\n"
        "print([u.find_spec(n) for n in ('kernels', 'tests', 'setup', 'scripts')], sys.path)"
    )
    # Only the command that runs has the checkout, in its sys.path and not in its PYTHONPATH.
    begin = f"import sys; sys.path.insert(0, {str(checkout)!r})\n"
    done = other.run("-c", begin + code, ask, ASCEND_PATCHES=patches or "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[None, None, None, None] ")
    assert str(checkout / "ascend_patch" / "startup") in done.stdout
    assert f"{str(checkout)!r}" not in done.stdout


def test_the_command_itself_works_where_only_the_folder_is_on_the_path(run, other):
    for patches in ("none", "all"):
        done = run(
            "--", str(other.python), "-m", "ascend_patch", "--version", ASCEND_PATCHES=patches
        )
        assert done.stdout.startswith("ascend-patch "), done.stderr


def test_the_version_that_runs_wins_over_one_that_is_installed_there(run, other, shim):
    """The .pth of the other one imports the package by its name, which PYTHONPATH answers first."""
    other.install(shim)
    found = said(run("--", str(other.python), "-c", PROBE))
    assert not found["from"].startswith(str(other.site))
    assert (found["doors"], found["armed"]) == (["pth", "sitecustomize"], 1)


def test_modules_that_are_unloaded_are_found_again(run, other):
    code = (
        "import sys\n"
        "for name in [n for n in sys.modules if n.startswith('ascend_patch')]:\n"
        "    del sys.modules[name]\n"
        "import ascend_patch.kernels, ascend_patch._rundir\n"
        "print(ascend_patch.__path__, ascend_patch.__spec__.name, ascend_patch.__file__)\n"
    )
    done = run("--", str(other.python), "-c", code)
    package = _installed_package(other, done.stdout)
    assert done.stdout.strip() == f"[{package!r}] ascend_patch {package}/__init__.py", done.stderr


def _installed_package(other, text):
    assert str(other.site) not in text
    return text.partition("'")[2].partition("'")[0]


def test_it_chains_to_the_users_own(run, other, tmp_path):
    user = room(tmp_path / "user", MARK.format("user"))
    found = said(run("--", str(other.python), "-c", PROBE, PYTHONPATH=str(user)))
    assert (found["doors"], found["marks"]) == (["sitecustomize"], ["user"])


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
def test_what_cannot_be_started_is_a_sentence(words, status, sentence):
    with pytest.raises(_run.RunError, match=sentence) as caught:
        _run.run(list(words))
    assert caught.value.status == status


def test_a_script_without_the_bit_has_a_hint(tmp_path):
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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ["/folder"]),
        ({"PYTHONPATH": ""}, ["/folder"]),
        ({"PYTHONPATH": "/a"}, ["/folder", "/a"]),
        # The empty entry is the working directory: the user's, and left.
        ({"PYTHONPATH": "/a::/folder:/b"}, ["/folder", "/a", "", "/b"]),
    ],
)
def test_the_environment_is_built_in_order(before, after):
    found = _run.environment_of({**before, "X": "1"}, Path("/folder"))
    assert found["PYTHONPATH"].split(os.pathsep) == after
    assert (found["ASCEND_PATCHES"], found["X"]) == ("all", "1")


def test_nothing_is_written(run, other, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(home)}
    assert said(run("--", str(other.python), "-c", PROBE, **places))["doors"]
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", _run.STARTUP_FILES)
def test_a_shim_that_is_not_whole_is_a_sentence(name, furnished):
    (furnished.site / "ascend_patch" / "startup" / name).unlink()
    done = start([str(furnished.python), "-c", LAUNCH, "true"])
    assert done.returncode == 126
    assert f"has no {name}; install ascend-patch again" in done.stdout


def test_a_path_that_pythonpath_cannot_hold_is_a_sentence(furnished, shim, tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    house = House.build(folder / "house", os.path.realpath(furnished.python))
    house.install(shim)
    done = start([str(house.python), "-c", LAUNCH, "true"])
    assert done.returncode == 126
    assert "has a ':' in its path" in done.stdout
