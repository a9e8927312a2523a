"""Real installs: plain, editable, from a wheel, and from an archive without a network."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from house import ROOT, House, base_python, constant, copy_shim, start

pytestmark = pytest.mark.slow

FORMS = ["plain", "wheel", "editable"]
KERNELS = (
    "import importlib.util as u\n"
    "import ascend_patch.kernels.dispatch as d\n"
    "print([u.find_spec(name) for name in ('kernels', 'tests', 'setup')], d.__name__)\n"
)
STATUS = (
    "import vllm, ascend_patch\n"
    "found = ascend_patch.status()\n"
    "print(repr((found['host'], found['versions']['vllm'], found['door'])))\n"
)


def checked(done):
    if done.returncode:
        network = "Could not find a version|No matching distribution|ConnectionError|Temporary fail"
        if re.search(network, done.stderr + done.stdout):
            pytest.skip("setuptools, wrapt or packaging cannot be fetched: no package index")
        raise AssertionError(done.stdout + done.stderr)
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout's sources: builds leave traces."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in constant(ROOT / "scripts" / "bundle", "SOURCES"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
    # What a checkout has lying about must not be packed.
    (folder / "build" / "lib" / "ascend_patch").mkdir(parents=True)
    (folder / "build" / "lib" / "ascend_patch" / "removed.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    house = House.with_pip(tmp_path_factory.mktemp("builder"), base_python())
    checked(house.pip("install", "setuptools>=70.1", "build"))
    return house


@pytest.fixture(scope="module")
def built(builder, source):
    """The sdist, and the wheel that is built from it."""
    out = source / "out"
    checked(builder.run("-m", "build", "--no-isolation", "--outdir", str(out), str(source)))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def editable_vllm(tmp_path_factory):
    """As in the images of Ascend: a vLLM in a workspace, with a version that says little."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "vllm").mkdir()
    (folder / "csrc").mkdir()
    (folder / "vllm" / "__init__.py").write_text("")
    (folder / "vllm" / "_version.py").write_text("__version__ = '0.18.0+empty'\n")
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools>=70.1']\n"
        "build-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'vllm'\nversion = '0.18.0+empty'\n"
        "[tool.setuptools]\npackages = ['vllm']\n"
    )
    return folder


@pytest.fixture(scope="module", params=FORMS)
def installed(request, tmp_path_factory, source, built, editable_vllm):
    house = House.with_pip(tmp_path_factory.mktemp(request.param), base_python())
    checked(house.pip("install", "--editable", str(editable_vllm)))
    what = {"plain": [str(source)], "wheel": [str(built[1])], "editable": ["-e", str(source)]}
    checked(house.pip("install", *what[request.param]))
    return house


def test_the_doors_are_open(installed):
    said = installed.boot()
    # An editable install has its folder for PYTHONPATH on sys.path, sitecustomize and all.
    editable = "startup" in (installed.site / "ascend_patch.pth").read_text().partition("\n")[0]
    assert said["doors"] == (["pth", "sitecustomize"] if editable else ["pth"])
    assert (said["armed"], said["others"]) == (1, [])
    assert said["stderr"] == ""
    assert installed.boot(patches="")["doors"] == []


def test_off_imports_nothing_else(installed):
    code = "import sys; print(sorted(n for n in sys.modules if 'ascend' in n))"
    assert installed.run("-c", code).stdout == "[]\n"


def test_kernels_are_importable_under_our_name_only(installed):
    for patches in ("", "all"):
        done = installed.run("-c", KERNELS, ASCEND_PATCHES=patches)
        assert done.stdout == "[None, None, None] ascend_patch.kernels.dispatch\n", done.stderr


def test_an_editable_vllm_beside_it_is_seen(installed, tmp_path):
    environ = {"ASCEND_PATCHES": "all", "ASCEND_PATCHES_STATUS_DIR": str(tmp_path)}
    done = installed.run("-c", STATUS, **environ)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == ("vllm", "0.18.0+empty", "pth")


def test_the_command_and_the_entry_point(installed):
    done = installed.run("-m", "ascend_patch", "--help")
    assert done.returncode == 0, done.stderr
    assert installed.python.with_name("ascend-patch").is_file()
    code = (
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='vllm.general_plugins')\n"
        "print(point.name, point.load().__module__)"
    )
    assert installed.run("-c", code).stdout == "ascend_patch ascend_patch._plugin\n"


def test_uninstalling_leaves_nothing(installed):
    checked(installed.pip("uninstall", "--yes", "ascend-patch"))
    left = [p.name for p in installed.site.iterdir() if "ascend" in p.name]
    assert left == []
    assert installed.boot()["doors"] == []


def test_an_archive_holds_each_file_once(built, tmp_path):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = tmp_path / "expected"
    copy_shim(ROOT, expected)
    files = {str(p.relative_to(expected)) for p in expected.rglob("*") if p.is_file()}
    assert sorted(names) == sorted(files)
    with tarfile.open(sdist) as archive:
        packed = [name.partition("/")[2] for name in archive.getnames()]
    assert len(packed) == len(set(packed))
    for name in ("kernels/__init__.py", "sitecustomize.py", "LICENSE", "README.md"):
        assert name in packed
    assert "ascend_patch/startup/sitecustomize.py" in packed
    assert not [name for name in packed if name.startswith(("ascend_patch/kernels", "build"))]


def test_the_bundle_installs_without_an_index(builder, tmp_path):
    machine = platform.machine()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    words = ["--python-version", version, "--platform", machine, "--output", str(tmp_path)]
    archive = Path(checked(builder.run(str(ROOT / "scripts" / "bundle"), *words)).stdout.strip())
    with tarfile.open(archive) as file:
        file.extractall(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "pip install --no-index --find-links ." in (folder / "README.txt").read_text()
    house = House.with_pip(tmp_path / "offline", base_python())
    offline = {"PYTHON": str(house.python), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    done = start(["sh", str(folder / "install.sh")], **offline)
    assert done.returncode == 0, done.stderr
    assert house.boot()["doors"] == ["pth"]
    assert house.run("-c", "import wrapt, packaging").returncode == 0


def test_a_bundle_without_pip_is_a_sentence(house, tmp_path):
    done = house.run(str(ROOT / "scripts" / "bundle"), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/bundle: pip wheel failed")
    assert done.stderr.count("\n") == 1
