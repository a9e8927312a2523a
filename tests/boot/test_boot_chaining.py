"""A neighbour's sitecustomize, in front of ours and behind it: both run, and Python starts."""

from __future__ import annotations

import sys

import pytest
from house import MARK, room, start

USER = MARK.format("user")
# As ddtrace does it: leave sys.path, give up the name, import again, come back.
CHAINS = (
    MARK.format("chains")
    + """
import os, sys
here = os.path.dirname(os.path.abspath(__file__))
index = sys.path.index(here)
del sys.path[index]
mine = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError:
    sys.modules["sitecustomize"] = mine
finally:
    sys.path.insert(index, here)
"""
)
# As New Relic does it: search everywhere but here, in front as well, and run what is found.
SEARCHES = (
    MARK.format("searches")
    + """
import os, sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
here = os.path.dirname(os.path.abspath(__file__))
spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != here])
if spec is not None:
    spec.loader.exec_module(module_from_spec(spec))
"""
)
HOSTILE = {
    "raises": "raise ValueError('boom')\n",
    "import error": "import no_such_module\n",
    "syntax error": "def\n",
    "exits": "import sys; sys.exit(3)\n",
    "exits silently": "raise SystemExit\n",
    "generator exit": "raise GeneratorExit\n",
    "a base exception": "class Strange(BaseException): pass\nraise Strange('x')\n",
    "empties the environment": "import os; os.environ.clear()\n",
    "empties sys.path": "import sys; sys.path.clear()\n",
    "takes our folder away": "import sys; sys.path[:] = [p for p in sys.path if 'python3' in p]\n",
    "closes stderr": "import sys; sys.stderr.close()\n",
    "has no stderr": "import sys; sys.stderr = None\n",
    "gives up its name": "import sys; del sys.modules['sitecustomize']\n",
    "unloads us": (
        "import sys\nfor name in [n for n in sys.modules if n.startswith('ascend_patch')]:\n"
        "    del sys.modules[name]\n"
    ),
}
# In front of ours the first four end Python with us or without us, and the last never chains.
FATAL_IN_FRONT = ("exits", "exits silently", "generator exit", "a base exception", "syntax error")


@pytest.fixture
def user(tmp_path):
    return room(tmp_path / "user", USER)


def test_behind_ours_it_runs_and_has_the_name(house, checkout, user):
    said = house.boot(path=(checkout, user))
    assert said["doors"] == ["sitecustomize"]
    assert said["marks"] == ["user"]
    assert said["sitecustomize"] == str(user / "sitecustomize.py")
    assert (said["leftovers"], said["stderr"]) == ([], "")


def test_behind_ours_it_runs_when_off(house, checkout, user):
    said = house.boot(path=(checkout, user), patches="")
    assert (said["doors"], said["marks"]) == ([], ["user"])


def test_in_front_of_a_drop_in_it_shadows_ours(house, checkout, user):
    # Nothing of ours runs, so nothing of ours can help it: `doctor` says so, and `run` is the cure.
    said = house.boot(path=(user, checkout))
    assert (said["doors"], said["marks"]) == ([], ["user"])


def test_in_front_of_an_installed_shim_the_pth_opens_the_door(furnished, user):
    said = furnished.boot(path=(user,))
    assert (said["doors"], said["marks"], said["armed"]) == (["pth"], ["user"], 1)


def test_in_site_packages_behind_a_drop_in(house, checkout):
    room(house.site, USER)
    said = house.boot(path=(checkout,))
    assert (said["doors"], said["marks"]) == (["sitecustomize"], ["user"])


@pytest.mark.parametrize("neighbour", [CHAINS, SEARCHES], ids=["chains", "searches"])
@pytest.mark.parametrize("order", ["theirs ours user", "ours theirs user", "ours user theirs"])
def test_one_that_chains_too(neighbour, order, house, checkout, user, tmp_path):
    theirs = room(tmp_path / "theirs", neighbour)
    folders = {"theirs": theirs, "ours": checkout, "user": user}
    said = house.boot(path=tuple(folders[name] for name in order.split()))
    assert said["doors"] == ["sitecustomize"]
    assert said["armed"] == 1
    assert said["leftovers"] == []
    if order != "ours user theirs":  # there the user's own, which runs no other, shadows theirs
        name = "chains" if neighbour is CHAINS else "searches"
        assert sorted(said["marks"]) == sorted([name, "user"])


@pytest.mark.parametrize("what", HOSTILE)
def test_python_starts_whatever_is_behind_ours(what, house, checkout, tmp_path):
    said = house.boot(path=(checkout, room(tmp_path / "hostile", HOSTILE[what])))
    assert (said["doors"], said["armed"]) == (
        ["sitecustomize"] if what != "unloads us" else [],
        1,
    )
    assert "Traceback" not in said["stderr"]


@pytest.mark.parametrize("what", [name for name in HOSTILE if name not in FATAL_IN_FRONT])
def test_python_starts_whatever_is_in_front_and_chains_to_ours(what, house, checkout, tmp_path):
    folder = room(tmp_path / "hostile", CHAINS + HOSTILE[what])
    said = house.boot(path=(folder, checkout))
    assert said["armed"] == 1
    assert "Traceback" not in said["stderr"]


WITH_VLLM = [name for name in HOSTILE if name != "empties sys.path"]


@pytest.mark.parametrize("what", WITH_VLLM)
def test_vllm_is_patched_all_the_same(what, checkout, fake_vllm, tmp_path):
    hostile = room(tmp_path / "hostile", HOSTILE[what])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import vllm, ascend_patch\n"
        "status = ascend_patch.status()\n"
        "print(sorted(p['id'] for p in status['patches']), status['problems'])\n"
    )
    done = start(
        [sys.executable, "-c", code, str(fake_vllm)],
        path=(checkout, hostile),
        ASCEND_PATCHES="rotary",
        ASCEND_PATCHES_DEVICE="cpu",
        ASCEND_PATCHES_STATUS_DIR=str(tmp_path / "status"),
    )
    assert (done.returncode, done.stdout) == (0, "['rotary'] []\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_an_exception_reads_as_it_does_without_us(house, checkout, tmp_path):
    hostile = room(tmp_path / "hostile", HOSTILE["raises"])
    alone = house.boot(path=(hostile,))["stderr"]
    assert house.boot(path=(checkout, hostile))["stderr"] == alone
    assert "ValueError: boom" in alone


def test_an_exit_is_reported_in_one_line(house, checkout, tmp_path):
    hostile = room(tmp_path / "hostile", HOSTILE["exits"])
    said = house.boot(path=(checkout, hostile))["stderr"]
    assert said.startswith("ascend-patch: ")
    assert str(hostile / "sitecustomize.py") in said
    assert said.count("\n") == 1


def test_a_package_and_a_compiled_file_are_run(house, checkout, tmp_path):
    package = tmp_path / "package" / "sitecustomize"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sitecustomize.part\n" + USER)
    (package / "part.py").write_text(MARK.format("part"))
    assert house.boot(path=(checkout, package.parent))["marks"] == ["part", "user"]
    source = room(tmp_path / "compiled", USER) / "sitecustomize.py"
    code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2])"
    house.run("-c", code, str(source), f"{source}c")
    source.unlink()
    assert house.boot(path=(checkout, source.parent))["marks"] == ["user"]


def test_a_folder_without_init_hides_nothing(house, checkout, tmp_path, user):
    (tmp_path / "data" / "sitecustomize").mkdir(parents=True)
    assert house.boot(path=(checkout, tmp_path / "data", user))["marks"] == ["user"]


def test_one_that_an_import_hook_brings_in(house, checkout, tmp_path):
    """As editable installs of setuptools do."""
    file = room(tmp_path / "hooked", USER) / "sitecustomize.py"
    (house.site / "hook.py").write_text(
        "import sys\n"
        "from importlib.util import spec_from_file_location\n"
        "class Hook:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'sitecustomize':\n"
        f"            return spec_from_file_location(name, {str(file)!r})\n"
        "sys.meta_path.append(Hook)\n"
    )
    (house.site / "hook.pth").write_text("import hook\n")
    said = house.boot(path=(checkout,))
    assert (said["doors"], said["marks"]) == (["sitecustomize"], ["user"])


def test_usercustomize_is_unaffected(house, checkout, tmp_path, user):
    # A virtual environment has no user site, but one on PYTHONPATH is imported where it is enabled.
    (house.python.parents[1] / "pyvenv.cfg").open("a").write(
        "include-system-site-packages = true\n"
    )
    (user / "usercustomize.py").write_text(MARK.format("usercustomize"))
    said = house.boot(path=(checkout, user), HOME=str(tmp_path))
    assert said["marks"] == ["user", "usercustomize"]


def test_ours_twice_runs_once_and_is_noticed(furnished, checkout, user):
    said = furnished.boot(path=(checkout, user))
    assert said["doors"] == ["pth", "sitecustomize"]
    assert said["armed"] == 1
    assert said["from"].startswith(str(checkout))
    assert (said["marks"], said["others"]) == (["user"], [])
    # Where two copies' sitecustomize run, the one that came late is noticed.
    said = furnished.boot(path=(checkout, furnished.site / "ascend_patch" / "startup", user))
    assert said["others"] == [str(furnished.site / "ascend_patch")]
    assert (said["armed"], said["marks"]) == (1, ["user"])


def test_copies_in_a_circle_come_to_an_end(house, shim, checkout, user, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(checkout)
    startup = shim / "ascend_patch" / "startup"
    path = (checkout, startup, link, checkout, startup, link / "ascend_patch" / "startup", user)
    said = house.boot(path=path)
    assert (said["doors"], said["armed"], said["marks"]) == (["sitecustomize"], 1, ["user"])
    assert said["stderr"] == ""


def test_a_child_process_chains_again(house, checkout, user):
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    probe = "import sys; print(sys.marks, sys.modules['ascend_patch._bootstrap'].doors)"
    done = house.run("-c", code, probe, path=(checkout, user), ASCEND_PATCHES="all")
    assert done.stdout.strip() == "['user'] ['sitecustomize']"
