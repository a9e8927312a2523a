"""Installs overwrite nothing, are removed whole, and activate: each with a server started in it.

Everything is built and installed without a package index. `tests/e2e/test_install_e2e.py` starts
real vLLM servers in the same ways.
"""

from __future__ import annotations

import ast
import email
import os
import shutil
import sys
import zipfile

import pytest
from installs import OLDER_LINE, ROOT, STARTUP, WAYS, Way, Workshop, contents, editable, start


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_server_starts_patched(way, workshop, tmp_path):
    way = way(workshop)
    for process in way.serve(tmp_path):
        assert process["doors"], "not active"
        assert (process["patches"], process["others"]) == (4, [])
        assert process["problems"] == []
        assert process["marks"] == way.marks
        assert not process["kernels"], "the folder kernels of a checkout answers to its name"


def test_a_server_without_the_shim_is_not(workshop, tmp_path):
    """The control: it is the install that activates, and nothing of the tests."""
    way = Way(workshop.house())
    assert [process["doors"] for process in way.serve(tmp_path)] == [[], []]


@pytest.mark.fault("wheel_overwrites_sitecustomize")
def test_another_distribution_s_sitecustomize_stays_as_it_is(workshop, tmp_path):
    house = workshop.house()
    workshop.install(house, workshop.other_distribution())
    before = contents(house.site)
    workshop.install(house, workshop.wheel)
    after = contents(house.site)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    assert changed == [], "files of another distribution are changed"
    way = Way(house)
    assert [p["marks"] for p in way.serve(tmp_path)] == [["other"]] * 2, "it no longer runs"
    workshop.pip(house, "uninstall", "--yes", "ascend-patch")
    assert contents(house.site) == before
    assert [(p["doors"], p["marks"]) for p in way.serve(tmp_path)] == [([], ["other"])] * 2


@pytest.mark.fault("wheel_overwrites_sitecustomize")
def test_no_file_of_the_wheel_is_outside_of_its_own_names(workshop):
    with zipfile.ZipFile(workshop.wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name.partition("-")[0] for name in top} == {"ascend_patch", "ascend_patch.pth"}
    assert "ascend_patch/startup/sitecustomize.py" in names
    # Anything with this name could be imported as a package of its own.
    assert "ascend_patch/startup/__init__.py" not in names


@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_pip_removes_what_it_has_installed_and_nothing_else(form, workshop):
    house = workshop.house()
    before = contents(house.python.parents[1])
    workshop.install(house, getattr(workshop, form))
    assert contents(house.python.parents[1]) != before
    workshop.pip(house, "uninstall", "--yes", "ascend-patch")
    assert contents(house.python.parents[1]) == before


@pytest.mark.fault("older_editable_install")
def test_an_editable_install_lives_on_where_build_is_emptied(workshop, tmp_path):
    """`git clean -fdx` and `rm -rf build` are what people do in a checkout."""
    way = editable(workshop)
    build = workshop.source / "build"
    if build.exists():
        build.rename(workshop.folder / "build-taken-away")
    try:
        found = way.serve(tmp_path)
    finally:
        if (workshop.folder / "build-taken-away").exists():
            (workshop.folder / "build-taken-away").rename(build)
    assert all(process["doors"] for process in found), "unpatched, without a word"


@pytest.mark.fault("older_editable_install")
def test_a_checkout_that_has_moved_is_said_by_an_editable_install(workshop, tmp_path):
    house = workshop.house()
    workshop.install(house, workshop.editable)
    workshop.source.rename(workshop.folder / "moved")
    try:
        done = house.run("-c", "print('started')", ASCEND_PATCHES="all")
        off = house.run("-c", "print('started')")
    finally:
        (workshop.folder / "moved").rename(workshop.source)
    assert (done.returncode, done.stdout, off.stderr) == (0, "started\n", "")
    assert done.stderr.count("\n") == 1, "nothing says that this process is unpatched"
    assert "the shim cannot be imported" in done.stderr
    assert "install ascend-patch again" in done.stderr


def older_editable(workshop, tmp_path, source):
    """What an older editable install has written: links in build, a path and the older line."""
    links = tmp_path / "build" / "__editable__.ascend_patch"
    links.mkdir(parents=True)
    for name in ("ascend_patch", "sitecustomize.py"):
        (links / name).symlink_to(source / name)
    house = workshop.house()
    (house.site / "ascend_patch.pth").write_text(f"{links}\n{OLDER_LINE}")
    return Way(house)


def test_the_line_of_an_older_editable_install_still_activates(workshop, tmp_path):
    for process in older_editable(workshop, tmp_path, ROOT).serve(tmp_path):
        assert (process["doors"], process["others"]) == (["pth", "sitecustomize"], [])
        assert (process["patches"], process["problems"]) == (4, [])


def test_without_the_name_that_it_imports_it_would_not(workshop, tmp_path):
    """The mutant of the test above: the door of the .pth is shut once the name is gone."""
    source = tmp_path / "renamed"
    shutil.copytree(workshop.source, source, symlinks=True)
    file = source / "ascend_patch" / "_bootstrap.py"
    file.write_text(file.read_text().replace("def open_door(", "def activate("))
    for process in older_editable(workshop, tmp_path, source).serve(tmp_path):
        assert "pth" not in process["doors"]


def test_an_older_wheel_is_upgraded_in_place(workshop, tmp_path):
    house = workshop.house()
    before = contents(house.site)
    workshop.install(house, workshop.older_wheel())
    assert (house.site / "sitecustomize.py").exists()
    workshop.install(house, workshop.wheel, "--upgrade")
    assert not (house.site / "sitecustomize.py").exists()
    for process in Way(house).serve(tmp_path):
        assert (process["doors"], process["others"], process["problems"]) == (["pth"], [], [])
    workshop.pip(house, "uninstall", "--yes", "ascend-patch")
    assert contents(house.site) == before


def test_the_checkout_and_the_package_have_one_sitecustomize(workshop):
    top, inside = ROOT / "sitecustomize.py", ROOT.joinpath(*STARTUP, "sitecustomize.py")
    assert top.read_bytes() == inside.read_bytes()
    assert os.path.samefile(top, inside)
    # A link that leads out of the checkout would be lost in a clone.
    assert os.readlink(top) == "ascend_patch/startup/sitecustomize.py"
    with zipfile.ZipFile(workshop.wheel) as archive:
        assert archive.read("ascend_patch/startup/sitecustomize.py") == inside.read_bytes()


def test_the_metadata_are_complete(workshop):
    with zipfile.ZipFile(workshop.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        found = email.message_from_bytes(archive.read(name))
        licences = [n for n in archive.namelist() if n.endswith("LICENSE")]
        assert [archive.read(n) for n in licences] == [(ROOT / "LICENSE").read_bytes()]
    assert "Apache-2.0" in (found["License"], found["License-Expression"])
    assert found["Author"] == "Ascend Patch contributors"
    assert found["Requires-Python"] == ">=3.10"
    assert found["Summary"]
    assert "vllm" in found["Keywords"]
    assert len(found.get_all("Classifier")) > 5
    # The body, or a header in older formats.
    assert "# Ascend Patch" in (found.get_payload() or found["Description"])
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("entry", ["{0}", "{0}/", "{0}//", "{0}/./", "{0}/../startup"])
def test_every_spelling_of_the_folder_activates_once(entry, workshop):
    house = workshop.house()
    path = (entry.format(ROOT.joinpath(*STARTUP)),)
    said = house.boot(path=path)
    assert (said["doors"], said["armed"], said["others"]) == (["sitecustomize"], 1, [])
    assert said["stderr"] == ""


def test_the_folder_stops_no_interpreter_that_is_too_old(workshop, tmp_path):
    """Its files are read by every Python that a server starts; syntax of today is for later."""
    for name in ("sitecustomize.py", "ascend_patch.py"):
        source = ROOT.joinpath(*STARTUP, name).read_text()
        ast.parse(source, feature_version=(3, 7))
    done = start([sys.executable, "-S", "-c", "print(1)"], path=(ROOT.joinpath(*STARTUP),))
    assert done.stdout == "1\n"
