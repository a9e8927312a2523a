"""ascend_patch.pth: what activates an installed shim, whatever sitecustomize runs there."""

from __future__ import annotations

import shutil

import pytest
from house import MARK, constant, room, start

USER = MARK.format("user")


def test_it_is_one_line_that_site_executes(checkout):
    text = constant(checkout / "setup.py", "OPEN_THE_DOOR")
    assert text.startswith("import ")
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_it_arms_once(furnished):
    said = furnished.boot()
    assert (said["doors"], said["armed"], said["others"]) == (["pth"], 1, [])


def test_the_startup_folder_beside_it_arms_once(furnished):
    said = furnished.boot(path=(furnished.site / "ascend_patch" / "startup",))
    assert (said["doors"], said["armed"], said["others"]) == (["pth", "sitecustomize"], 1, [])


def test_a_system_sitecustomize_shadows_ours(furnished):
    """As on Debian: theirs is in the standard library's folder, which comes first."""
    room(furnished.site / "early", USER)
    (furnished.site / "a.pth").write_text(
        f"import sys; sys.path.insert(0, {str(furnished.site / 'early')!r})\n"
    )
    said = furnished.boot()
    assert (said["doors"], said["marks"], said["armed"]) == (["pth"], ["user"], 1)


def test_another_distribution_s_sitecustomize_beside_it(furnished):
    room(furnished.site, USER)
    said = furnished.boot()
    assert (said["doors"], said["marks"]) == (["pth"], ["user"])


def test_off_imports_nothing(furnished):
    (furnished.site / "ascend_patch" / "__init__.py").write_text("raise SystemExit(9)\n")
    done = furnished.run("-c", "import sys; print('ascend_patch' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    "damage",
    [
        "no package",
        "empty package",
        "only a cache",
        "no bootstrap",
        "no finder",
        "syntax error",
        "exits",
        "no startup folder",
        "only the pth",
        "no pth",
    ],
)
def test_half_removed_it_never_stops_python(damage, furnished):
    package = furnished.site / "ascend_patch"
    if damage in ("no package", "only the pth", "empty package"):
        shutil.rmtree(package)
    if damage == "empty package":
        package.mkdir()
    if damage == "only a cache":
        shutil.rmtree(package)
        (package / "__pycache__").mkdir(parents=True)
    if damage == "no bootstrap":
        (package / "_bootstrap.py").unlink()
    if damage == "no finder":
        (package / "_finder.py").unlink()
    if damage == "syntax error":
        (package / "_bootstrap.py").write_text("def\n")
    if damage == "exits":
        (package / "_bootstrap.py").write_text("import sys; sys.exit(3)\n")
    if damage == "no startup folder":
        shutil.rmtree(package / "startup")
    if damage == "no pth":
        (furnished.site / "ascend_patch.pth").unlink()
    said = furnished.boot()
    assert said["armed"] == (damage == "no startup folder")
    assert "Traceback" not in said["stderr"]
    if damage in ("no startup folder", "no pth"):
        assert said["stderr"] == ""
    else:  # vLLM would run unpatched, so it is said, once
        assert said["stderr"].startswith("ascend-patch: ")
        assert said["stderr"].count("\n") == 1
    # Off, no damage is noticed.
    assert furnished.boot(patches="none")["stderr"] == ""


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_half_removed_it_says_nothing_where_nothing_can_be_said(stderr, furnished):
    shutil.rmtree(furnished.site / "ascend_patch")
    code = f"exec {furnished.python} -c 'import sys; sys.stderr = None; sys.exit(7)' {stderr}"
    assert start(["sh", "-c", code], ASCEND_PATCHES="all").returncode == 7


def test_a_missing_finder_is_told_once(furnished):
    (furnished.site / "ascend_patch" / "_finder.py").unlink()
    said = furnished.boot()
    assert said["armed"] == 0
    assert said["stderr"].count("could not be armed (ModuleNotFoundError") == 1
