"""`doctor` tells the truth about the door: what it says is what a process finds."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from house import House, room

DOCTOR = (
    "import sys; sys.path.append({root!r})\n"
    "from ascend_patch.cli import main\n"
    "sys.exit(main(['doctor', '--quick', '--json']))\n"
)


@pytest.fixture
def packaging(tmp_path) -> Path:
    """`packaging` alone, in a folder of its own."""
    folder = tmp_path / "packaging-only"
    spec = importlib.util.find_spec("packaging")
    shutil.copytree(Path(spec.origin).parent, folder / "packaging")
    return folder


def findings(house: House, root: Path, about: str, **options) -> list[dict[str, str]]:
    done = house.run("-c", DOCTOR.format(root=str(root)), ASCEND_PATCHES="all", **options)
    assert done.returncode == 1, done.stderr  # vLLM is missing here
    return [f for f in json.loads(done.stdout)["findings"] if f["about"] == about]


@pytest.mark.parametrize("form", ["drop-in", "installed", "neither"])
@pytest.mark.parametrize("in_front", [False, True], ids=["alone", "a stranger in front"])
def test_what_doctor_says_of_the_door(form, in_front, house, shim, checkout, packaging, tmp_path):
    if form == "installed":
        house.install(shim)
    path = [room(tmp_path / "stranger", "")] if in_front else []
    path += [checkout] if form == "drop-in" else []
    options = {"path": (*path, packaging)}
    doors = house.boot(**options)["doors"]
    (said,) = findings(house, checkout, "door", **options)
    if doors:
        assert said["level"] == "ok"
        assert f"open, by {' and '.join(doors)}, from " in said["text"]
    else:
        assert said["level"] == "wrong"
        assert said["text"].startswith("closed")
    assert bool(doors) == (form == "installed" or (form == "drop-in" and not in_front))


def test_a_stranger_in_front_of_a_drop_in_is_named(house, checkout, packaging, tmp_path):
    stranger = room(tmp_path / "stranger", "")
    (said,) = findings(house, checkout, "sitecustomize", path=(stranger, checkout, packaging))
    assert said["level"] == "wrong"
    assert str(stranger) in said["text"]


CHAINING = """
import os, sys
here = os.path.dirname(os.path.abspath(__file__))
place = sys.path.index(here)
del sys.path[place], sys.modules["sitecustomize"]
try:
    import sitecustomize
finally:
    sys.path.insert(place, here)
"""


def test_one_in_front_that_runs_ours_is_no_fault(house, checkout, packaging, tmp_path):
    """ddtrace's does."""
    first = room(tmp_path / "first", CHAINING)
    options = {"path": (first, checkout, packaging)}
    assert house.boot(**options)["doors"] == ["sitecustomize"]
    (said,) = findings(house, checkout, "sitecustomize", **options)
    assert said["level"] == "ok"
    assert f"{first / 'sitecustomize.py'} comes before ours" in said["text"]
    assert "open all the same, by sitecustomize." in said["text"]


def test_one_in_front_of_an_installed_shim_is_no_fault(furnished, checkout, packaging, tmp_path):
    first = room(tmp_path / "first", "")
    options = {"path": (first, packaging)}
    assert furnished.boot(**options)["doors"] == ["pth"]
    (said,) = findings(furnished, checkout, "sitecustomize", **options)
    assert said["level"] == "ok"
    assert "open all the same, by pth." in said["text"]


def test_a_copy_of_another_version_is_wrong(house, shim, checkout, packaging):
    house.install(shim)
    init = house.site / "ascend_patch" / "__init__.py"
    text = init.read_text(encoding="utf-8")
    assert '__version__ = "' in text
    init.write_text(text.replace('__version__ = "', '__version__ = "9.'), encoding="utf-8")
    found = findings(house, checkout, "ascend-patch", path=(checkout, packaging))
    others = [f for f in found if "another copy, 9." in f["text"]]
    assert {f["level"] for f in others} == {"wrong"}


def test_a_lost_editable_install_is_wrong(house, checkout, packaging, tmp_path):
    (house.site / "ascend_patch.pth").write_text(f"{tmp_path / 'gone'}\n", encoding="utf-8")
    found = findings(house, checkout, "ascend-patch", path=(checkout, packaging))
    assert any(f["level"] == "wrong" and "is gone" in f["text"] for f in found)


def test_without_packaging_doctor_says_so(house, checkout):
    done = house.run("-c", DOCTOR.format(root=str(checkout)), path=(checkout,))
    assert done.returncode == 1
    assert "packaging is missing" in json.loads(done.stdout)["error"]
