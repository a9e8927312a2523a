"""The environment that scripts run servers in: one that has vLLM, with the shim beside it.

Inside an environment that already has vLLM, that one is used and only the shim is added. Anywhere
else two virtual environments are made in the cache and kept for the next time:

- `venvs/<recipe>` holds vLLM, exactly as the lock file says, and never the shim;
- `venvs/shim-<digest>` holds the shim as pip installs it, one for each state of the sources, and
  sees the first through a .pth file. A test that runs while somebody edits keeps what it began
  with, and servers without the shim run from the first.

A marker file is written last: without it an environment is half-built and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _installer
from _system import SetupError, ensure_system, find_device, find_library, python_with_vllm, say

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPTS = CHECKOUT / "scripts"
LAYOUT = "1"  # change it to make every cached environment again
MARKER = "ascend-patch-complete"
FREE_GB = 9
LOCK_SECONDS = 2700
KEEP_SHIMS = 4

# The releases that a lock file describes, and the Python that each needs at least.
RELEASES = {
    "0.11.0": (3, 10),
    "0.17.0": (3, 10),
    "0.18.0": (3, 10),
    "0.23.0": (3, 10),
    "0.32.0": (3, 11),
}
DEFAULT, NEWEST = "0.18.0", "0.32.0"

# What makes an installed shim another one.
SHIM_SOURCES = ("ascend_patch", "kernels", "sitecustomize.py", "setup.py", "setup.cfg")
SHIM_BUILD_FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@dataclass(frozen=True)
class Environment:
    """Where servers run.

    Attributes:
        python: The interpreter that has vLLM and the shim.
        plain: The one that has vLLM alone; the same where the environment is the user's.
        device: "npu", "cuda" or "cpu".
        preload: For LD_PRELOAD, what a CPU server cannot start without; may be empty.
        drop_in: For PYTHONPATH, a folder with the shim where it could not be installed.
    """

    python: Path
    plain: Path
    device: str
    preload: str = ""
    drop_in: str = ""


def cache_root() -> Path:
    """Return the folder for everything that can be made again; it need not exist."""
    explicit = os.environ.get("ASCEND_PATCH_CACHE")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:
        raise SetupError(
            "You have no home directory; set ASCEND_PATCH_CACHE to a folder with 9 GB free."
        ) from error
    return root.absolute() / "ascend-patch"


def prepare(
    *, device: str = "auto", release: str | None = None, tests: bool = False
) -> Environment:
    """Return an environment to run servers in, made if need be.

    Args:
        device: "auto", or what to prepare for.
        release: One of `RELEASES`, in an environment of our own; None takes the vLLM that is
            there, or else `DEFAULT`.
        tests: Always use an environment of our own, and add what scripts/test runs to that of
            `DEFAULT`; the tests talk to servers of other releases from there.

    Raises:
        SetupError: It cannot be made; the message says what to do.
    """
    found = find_device() if device == "auto" else device
    if not tests and release is None:
        theirs = python_with_vllm()
        if theirs is not None:
            say(f"using the vLLM of {theirs}")
            return _add_shim_to(theirs, found)
    if not tests and found == "npu":
        raise SetupError(
            "There is an Ascend NPU and this makes no environment for it: start this inside the "
            "one (or the vllm-ascend image) that has vLLM, without --vllm, or pass --device cpu "
            "for the CPU build."
        )
    release = release or DEFAULT
    if found == "cuda" and not tests:
        if release != DEFAULT:
            raise SetupError(
                f"For GPUs this installs vLLM {DEFAULT} only; pass --device cpu for the CPU build "
                f"of {release}, or start this inside an environment that has it, without --vllm."
            )
        requirements, overrides, needs = SCRIPTS / "requirements-cuda.txt", None, ["venv"]
    else:
        requirements = SCRIPTS / f"requirements-cpu-{release}.txt"
        overrides = SCRIPTS / f"overrides-cpu-{release}.txt"
        needs, found = ["venv", "tcmalloc", "numa"], "cpu"
    if sys.version_info < RELEASES[release]:
        raise SetupError(
            f"vLLM {release} needs Python {'.'.join(map(str, RELEASES[release]))} and this is "
            f"{sys.version.split()[0]}; name a newer one in ASCEND_PATCH_PYTHON."
        )
    if tests:
        needs.append("compiler")
    ensure_system(needs)
    tools = tests and release == DEFAULT
    base = vllm_venv(found, release, requirements, overrides, tools=tools)
    shim = shim_venv(base)
    return Environment(
        python=shim / "bin/python",
        plain=base / "bin/python",
        device=found,
        preload=_preload(base) if found == "cpu" else "",
    )


def vllm_venv(
    device: str, release: str, requirements: Path, overrides: Path | None, *, tools: bool
) -> Path:
    """Return the virtual environment with vLLM, built if it is missing or half-built."""
    files = [requirements] if overrides is None else [requirements, overrides]
    # What this release needs beside its packages, as files for site-packages.
    beside = SCRIPTS / f"beside-vllm-{release}"
    files += sorted(p for p in beside.rglob("*") if p.is_file() and p.suffix != ".pyc")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    key = digest_of(files, LAYOUT, version, platform.machine(), sys.base_prefix)
    venv = cache_root() / "venvs" / f"vllm-{release}-{device}-py{version}-{key[:8]}"
    with locked(venv):
        if not _complete(venv, key):
            _check_space(venv)
            began = time.monotonic()
            say(f"making {venv} (once: a download of some 2 GB and a few minutes)")
            _installer.create(venv, cache_root())
            _installer.install(venv, requirements, cache_root(), overrides=overrides)
            if beside.is_dir():
                shutil.copytree(beside, _installer.site_packages(venv), dirs_exist_ok=True)
            _finish(venv, key)
            say(f"vLLM installed in {time.monotonic() - began:.0f} s")
        more = SCRIPTS / "requirements-test.txt"
        more_key = digest_of([more])
        if tools and not _complete(venv, more_key, "tools"):
            say("adding pytest, ruff and mypy")
            _installer.install(venv, more, cache_root())
            _finish(venv, more_key, "tools")
    return venv


def shim_venv(base: Path) -> Path:
    """Return a virtual environment with the shim as it is in this checkout now, over `base`."""
    key = sources_digest(base)
    venv = cache_root() / "venvs" / f"shim-{key[:12]}"
    with locked(venv):
        if not _complete(venv, key):
            _prune_shims(venv.parent, keep=venv)
            say("installing the shim")
            _installer.create(venv, cache_root())
            below = _installer.site_packages(base)
            # addsitedir and not a bare path: the .pth files down there count too.
            line = f"import site; site.addsitedir({str(below)!r})\n"
            (_installer.site_packages(venv) / "zz_vllm.pth").write_text(line)
            _installer.install_checkout(venv, CHECKOUT, cache_root(), build_python=base)
            _finish(venv, key)
        (venv / MARKER).touch()  # pruning goes by the time of last use
    return venv


def sources_digest(base: Path) -> str:
    """Return a digest of what an installed shim is made from."""
    files = [CHECKOUT / name for name in (*SHIM_SOURCES, *SHIM_BUILD_FILES)]
    found = [path for path in files if path.is_file()]
    for folder in (path for path in files if path.is_dir()):
        found += (
            path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
    return digest_of(sorted(found), LAYOUT, str(base))


def digest_of(files: list[Path], *words: str) -> str:
    """Return the SHA-256 of the words and of the files' names and contents."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        name = path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path
        content = path.read_bytes()
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """Hold the lock of an environment, so that two commands do not build it at once."""
    folder = cache_root() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"{folder} cannot be made ({error.strerror}); set ASCEND_PATCH_CACHE to a folder that "
            f"you can write, with {FREE_GB} GB free."
        ) from error
    with open(folder / f"{venv.name}.lock", "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say(f"waiting for another command that is making {venv.name}")
                    waiting = True
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"Another command has been making {venv} for {LOCK_SECONDS // 60} minutes; "
                        "end it and start again."
                    ) from None
                time.sleep(1)
        yield


def _complete(venv: Path, key: str, kind: str = "") -> bool:
    marker = venv / (f"{MARKER}-{kind}" if kind else MARKER)
    try:
        return marker.read_text() == key and (venv / "bin/python").exists()
    except OSError:
        return False


def _finish(venv: Path, key: str, kind: str = "") -> None:
    (venv / (f"{MARKER}-{kind}" if kind else MARKER)).write_text(key)


def _check_space(venv: Path) -> None:
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < FREE_GB:
        raise SetupError(
            f"{venv.parent} has {free:.1f} GB free and vLLM needs {FREE_GB}; make room, or set "
            "ASCEND_PATCH_CACHE to a folder on another disk."
        )


def _prune_shims(folder: Path, *, keep: Path) -> None:
    """Remove shims of older sources that nobody has used for a day, but for the newest few."""
    others = [path for path in folder.glob("shim-*") if path != keep and (path / MARKER).exists()]
    others.sort(key=lambda path: (path / MARKER).stat().st_mtime, reverse=True)
    for path in others[KEEP_SHIMS:]:
        if time.time() - (path / MARKER).stat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True)


def _preload(base: Path) -> str:
    """vLLM's CPU worker refuses to start without these."""
    libraries = [find_library("libtcmalloc_minimal.so.4"), str(base / "lib/libiomp5.so")]
    return ":".join(path for path in libraries if path and os.path.exists(path))


def _add_shim_to(python: Path, device: str) -> Environment:
    """Install the shim in an environment that is the user's, or drop it in where that fails."""
    preload = os.environ.get("LD_PRELOAD", "")
    if device == "cpu" and not preload:
        preload = _preload(Path(os.path.abspath(python)).parent.parent)
    problem = _installer.install_into_theirs(python, CHECKOUT)
    drop_in = ""
    if problem:
        say(f"the shim cannot be installed there ({problem}); dropping it in through PYTHONPATH")
        drop_in = str(CHECKOUT)
    return Environment(python, python, device, preload, drop_in)
