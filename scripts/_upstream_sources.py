"""The hosts' own tests, from their source distributions on the index, and what they need."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import _env
import _installer
import _upstream_models
from _package_index import Problem, find_pip, last_line, unpacked_sdist
from _system import SetupError, say

REQUIREMENTS = _env.SCRIPTS / "requirements-upstream.txt"
MARKER = "ascend-patch-complete"


def tests_of(distribution: str, release: str, given: Path | None) -> Path:
    """Return a folder that holds a release's `tests` and settings, and not its package.

    Args:
        given: A checkout or an unpacked source distribution, in place of the package index.

    Raises:
        SetupError: There are no tests; the message says what to do.
    """
    folder = _env.cache_root() / "upstream" / f"{distribution}-{release}"
    if given is not None:
        folder = folder.with_name(f"{folder.name}-given")
        shutil.rmtree(folder, ignore_errors=True)
    with _env.locked(folder):
        if not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with tempfile.TemporaryDirectory() as scratch:
                tree = given or _download(distribution, release, Path(scratch))
                if not (tree / "tests").is_dir():
                    raise SetupError(
                        f"{given or f'the sdist of {distribution} {release}'} has no folder "
                        "`tests`; give a checkout of the release with --sources DIR"
                    )
                shutil.copytree(tree / "tests", folder / "tests", symlinks=True)
                # pytest's own settings; the package itself would shadow the installed one.
                shutil.copy2(tree / "pyproject.toml", folder)
            (folder / MARKER).touch()
    return folder


def tools(python: Path) -> Path:
    """Return a folder for PYTHONPATH with pytest and what these tests add to it."""
    key = _env.digest_of([REQUIREMENTS], f"{sys.version_info[0]}.{sys.version_info[1]}")
    folder = _env.cache_root() / "upstream" / f"tools-{key[:8]}"
    with _env.locked(folder):
        if not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            pins = [line for line in REQUIREMENTS.read_text().splitlines() if line[:1] != "#"]
            for pin in pins:
                _installer.install_folder(folder, pin, _env.cache_root(), python=python)
            (folder / MARKER).touch()
    return folder


def models() -> Path:
    """Return a folder for HF_HOME: the configurations that tests name, and no weights."""
    folder = _env.cache_root() / "upstream" / "huggingface"
    _upstream_models.write(folder)
    return folder


def _download(distribution: str, release: str, scratch: Path) -> Path:
    """Unpack a source distribution."""
    say(f"fetching the tests of {distribution} {release}")
    otherwise = "give a checkout of the release with --sources DIR"
    try:
        work, said = unpacked_sdist(find_pip(otherwise), f"{distribution}=={release}", scratch)
    except Problem as problem:
        raise SetupError(str(problem)) from None
    found = [file.parent for file in work.rglob("PKG-INFO") if (file.parent / "tests").is_dir()]
    if not found:
        raise SetupError(
            f"the source distribution of {distribution} {release} could not be had "
            f"({last_line(said)}); {otherwise}"
        )
    return min(found, key=lambda folder: len(folder.parts))
