"""The checkout must not answer to ``import kernels``: that name is another distribution's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ascend_patch.kernels

ROOT = Path(ascend_patch.kernels.__file__).resolve().parents[1]
if ROOT.name == "ascend_patch" or not (ROOT / "kernels" / "__init__.py").is_file():
    pytest.skip("needs a checkout: here kernels/ is installed", allow_module_level=True)


@pytest.fixture
def real(tmp_path):
    """A folder for sys.path that holds somebody else's ``kernels``."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import sys\n"
        "assert sys.modules[__name__].__file__ == __file__\n"
        "from kernels.part import VALUE\n"
        "WHO = 'real'\n"
    )
    (package / "part.py").write_text("VALUE = 7\n")
    return package.parent


def python(code, *path, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND_PATCH")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    # -S: neither this checkout's sitecustomize nor an installed `kernels` takes part.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REAL = "import kernels, kernels.part; print(kernels.WHO, kernels.part.VALUE, kernels.__name__)"
ABSENT = """
import sys
try:
    import kernels
except ModuleNotFoundError as error:
    print(error.name, "|", error, "|", "kernels" in sys.modules)
"""


def test_real_package_wins_when_the_checkout_is_on_the_path(real, tmp_path):
    assert python(REAL, ROOT, real, cwd=tmp_path) == "real 7 kernels"


def test_real_package_wins_when_the_checkout_is_the_working_directory(real):
    assert python(REAL, real, cwd=ROOT) == "real 7 kernels"


def test_real_package_wins_behind_several_names_of_the_checkout(real, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ROOT)
    path = (link, ROOT, ROOT / "ascend_patch", real)
    assert python(REAL, *path, cwd=tmp_path) == "real 7 kernels"


def test_from_import_and_import_module(real):
    code = (
        "from kernels import WHO; import importlib, sys; "
        "m = importlib.import_module('kernels'); "
        "print(WHO, m is sys.modules['kernels'], m.__spec__._initializing)"
    )
    assert python(code, real, cwd=ROOT) == "real True False"


@pytest.mark.parametrize("where", ["path", "working directory"])
def test_absent_package_is_absent(where, tmp_path):
    expected = "kernels | No module named 'kernels' | False"
    if where == "path":
        assert python(ABSENT, ROOT, cwd=tmp_path) == expected
    else:
        assert python(ABSENT, cwd=ROOT) == expected


def test_a_folder_without_init_is_not_the_package(tmp_path):
    (tmp_path / "data" / "kernels").mkdir(parents=True)
    expected = "kernels | No module named 'kernels' | False"
    assert python(ABSENT, ROOT, tmp_path / "data", cwd=tmp_path) == expected


def test_two_checkouts_do_not_hand_over_in_circles(tmp_path):
    other = tmp_path / "other" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text((ROOT / "kernels" / "__init__.py").read_text())
    expected = "kernels | No module named 'kernels' | False"
    assert python(ABSENT, ROOT, other.parent, cwd=tmp_path) == expected


def test_a_fault_in_the_real_package_is_its_own(real):
    (real / "kernels" / "part.py").write_text("1 / 0\n")
    code = (
        "import sys\n"
        "try:\n    import kernels\n"
        "except ZeroDivisionError:\n    print('kernels' in sys.modules)\n"
    )
    assert python(code, real, cwd=ROOT) == "False"


def test_our_own_name_still_imports(real):
    code = "import ascend_patch.kernels.dispatch as d, kernels; print(d.__name__, kernels.WHO)"
    assert python(code, ROOT, real, cwd=ROOT) == "ascend_patch.kernels.dispatch real"


def test_another_thread_never_sees_half_of_the_real_package(real):
    (real / "kernels" / "__init__.py").write_text("import time; time.sleep(0.3); WHO = 'real'\n")
    code = (
        "import threading, time\n"
        "def late():\n    time.sleep(0.1)\n    import kernels\n    print(kernels.WHO)\n"
        "t = threading.Thread(target=late); t.start()\n"
        "import kernels; t.join()\n"
    )
    assert python(code, real, cwd=ROOT) == "real"
