"""The name `kernels` is another package's: no form of the shim may answer to it, or hide it."""

from __future__ import annotations

import pytest

ASK = (
    "import importlib, importlib.util\n"
    "import ascend_patch.kernels\n"
    "spec = importlib.util.find_spec('kernels')\n"
    "try:\n    kernels = importlib.import_module('kernels')\n"
    "except ModuleNotFoundError as error:\n    kernels = error.name\n"
    "print(spec and spec.origin, getattr(kernels, 'WHO', None))\n"
)


@pytest.fixture
def real(tmp_path):
    """Somebody's package named kernels, with a module named as one of ours."""
    package = tmp_path / "real" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'real'\n")
    (package / "dispatch.py").write_text("")
    return package


def ask(house, **options):
    done = house.run("-c", ASK, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("patches", ["", "all"])
@pytest.mark.parametrize("where", ["drop-in", "drop-in and folder", "installed"])
def test_nothing_answers_to_it(where, patches, house, shim, checkout):
    options = {"ASCEND_PATCHES": patches}
    if where == "installed":
        house.install(shim)
    else:
        options["path"] = (checkout,)
    if where == "drop-in and folder":
        options["cwd"] = checkout
    assert ask(house, **options) == "None None"


@pytest.mark.parametrize("patches", ["", "all"])
@pytest.mark.parametrize("where", ["drop-in", "drop-in and folder", "installed", "behind"])
def test_the_real_one_is_found(where, patches, house, shim, checkout, real):
    options = {"ASCEND_PATCHES": patches, "path": (checkout, real.parent)}
    if where == "installed":
        house.install(shim)
        options["path"] = (real.parent,)
    if where == "drop-in and folder":
        options["cwd"] = checkout
    if where == "behind":
        options["path"] = (real.parent, checkout)
    assert ask(house, **options) == f"{real / '__init__.py'} real"


def test_the_real_one_beside_an_installed_shim(furnished, real):
    real.rename(furnished.site / "kernels")
    assert ask(furnished) == f"{furnished.site / 'kernels' / '__init__.py'} real"


def test_caches_may_be_thrown_away(house, checkout, real):
    code = "import importlib; importlib.invalidate_caches()\n" + ASK
    done = house.run("-c", code, path=(checkout, real.parent))
    assert done.stdout.strip() == f"{real / '__init__.py'} real"


def test_other_modules_of_the_checkout_are_still_found(house, checkout):
    done = house.run("-c", "import sitecustomize, ascend_patch.cli", path=(checkout,))
    assert done.returncode == 0, done.stderr
