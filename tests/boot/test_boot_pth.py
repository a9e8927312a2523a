"""ascend_patch.pth: the door where another sitecustomize shadows ours, and its manners."""

from __future__ import annotations

import shutil

import pytest
from house import MARK, constant, room

USER = MARK.format("user")


def test_it_is_one_line_that_site_executes(checkout):
    text = constant(checkout / "setup.py", "OPEN_THE_DOOR")
    assert text.startswith("import ")
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_both_doors_arm_once(furnished):
    said = furnished.boot()
    assert (said["doors"], said["armed"], said["others"]) == (["pth", "sitecustomize"], 1, [])


def test_a_system_sitecustomize_shadows_ours(furnished):
    """As on Debian: theirs is in the standard library's folder, which comes first."""
    room(furnished.site / "early", USER)
    (furnished.site / "a.pth").write_text(
        f"import sys; sys.path.insert(0, {str(furnished.site / 'early')!r})\n"
    )
    said = furnished.boot()
    assert (said["doors"], said["marks"], said["armed"]) == (["pth"], ["user"], 1)


def test_another_distribution_has_replaced_our_sitecustomize(furnished):
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
        "no sitecustomize",
        "only the pth",
        "only sitecustomize",
    ],
)
def test_half_removed_it_never_stops_python(damage, furnished):
    package = furnished.site / "ascend_patch"
    if damage in ("no package", "only the pth", "only sitecustomize", "empty package"):
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
    if damage in ("no sitecustomize", "only the pth"):
        (furnished.site / "sitecustomize.py").unlink()
    if damage == "only sitecustomize":
        (furnished.site / "ascend_patch.pth").unlink()
    said = furnished.boot()
    whole = damage == "no sitecustomize"
    assert said["armed"] == whole
    assert "Traceback" not in said["stderr"]
    if damage in ("no sitecustomize", "only the pth"):
        assert said["stderr"] == ""
    elif damage != "no finder":  # each door tries, and says that the shim is not whole
        assert said["stderr"].startswith("ascend-patch: open_the_door failed with ")
        assert said["stderr"].count("\n") == 1


def test_a_missing_finder_is_told_once(furnished):
    (furnished.site / "ascend_patch" / "_finder.py").unlink()
    said = furnished.boot()
    assert said["armed"] == 0
    assert said["stderr"].count("could not be armed (ModuleNotFoundError") == 1
