"""The `.py` files of a release, from the package index, a checkout or a repository, and kept.

What is fetched lies in the cache as `sources/<distribution>-<release>/<package>/...`, with a note
of where it came from. Nothing of a release is imported, built or run.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from _package_index import Problem, download, last_line, package_root, run, write

NOTE = "ascend-patch-source.json"


def fetched(host: str, release: str, cache: Path) -> tuple[Path, dict[str, str]]:
    """The folder that holds a final release's package, fetched if it is not there yet.

    Args:
        host: `vllm` or `vllm_ascend`.
        release: As the package index has it, 0.18.0.
        cache: Where sources are kept.

    Returns:
        The folder, and what it is: kind (wheel or sdist) and its file's name.

    Raises:
        Problem: The index has no such release, or pip cannot be used.
    """
    if not release[:1].isdigit():
        raise Problem(f"{release} is no release that pip knows; give its tree with --from DIR")
    folder = cache / f"{host.replace('_', '-')}-{release}"
    with contextlib.suppress(OSError, ValueError):
        return folder, json.loads((folder / NOTE).read_text(encoding="utf-8"))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as scratch:
        tree, note = download(host, release, Path(scratch))
        ready = Path(scratch) / "ready"
        copy_python(tree / host, ready / host)
        (ready / NOTE).write_text(json.dumps(note), encoding="utf-8")
        # Another process may have been faster; both have the same files.
        with contextlib.suppress(OSError):
            ready.rename(folder)
    return folder, json.loads((folder / NOTE).read_text(encoding="utf-8"))


def head_of(tree: Path) -> str:
    """The commit of a checkout; empty where it is none."""
    if not (tree / ".git").exists() or not shutil.which("git"):
        return ""
    return run(["git", "-C", str(tree), "rev-parse", "HEAD"]).stdout.strip()


def is_repository(folder: Path) -> bool:
    """Whether a folder is a bare repository, which has commits and no files of its own."""
    return (folder / "HEAD").is_file() and (folder / "objects").is_dir()


def archived(host: str, repository: Path, commit: str, into: Path) -> Path:
    """The package's `.py` files as a commit of a repository has them.

    Raises:
        Problem: There is no such commit, or git is missing.
    """
    if not shutil.which("git"):
        raise Problem(f"{repository} is a repository, and git is not installed")
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit, host]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        said = last_line(done.stderr.decode(errors="replace"))
        raise Problem(f"{repository} has no {host} in {commit}: {said}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".py"):
                write(into, member.name, archive.extractfile(member).read())  # type: ignore[union-attr]
    return package_root(host, into)


def copy_python(package: Path, into: Path) -> None:
    """Copy a package's `.py` files, and nothing else of it."""
    for file in package.rglob("*.py"):
        target = into / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
