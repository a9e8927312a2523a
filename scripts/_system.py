"""What the machine has: its device, an environment with vLLM, the system's libraries."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

LIBRARY_FOLDERS = (
    "/usr/lib/*-linux-gnu",
    "/lib/*-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)
APT_SECONDS = 900


class SetupError(Exception):
    """The environment cannot be made; the message is a sentence that says what to do."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[ascend-patch] {text}", flush=True)


def find_device() -> str:
    """Return "npu", "cuda" or "cpu". Looks at device files, so it needs no driver's tools."""
    if glob.glob("/dev/davinci[0-9]*"):
        return "npu"
    if glob.glob("/dev/nvidia[0-9]*"):
        return "cuda"
    return "cpu"


def has_vllm(python: str) -> bool:
    """Whether that interpreter would find vLLM; nothing of it is imported."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    # `-c` puts the working directory on sys.path, and a folder called vllm is no vLLM.
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [python, "-c", probe], cwd=empty, capture_output=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


def python_with_vllm() -> Path | None:
    """Return the interpreter of the environment we were started in, if that one has vLLM."""
    candidates = []
    if os.environ.get("VIRTUAL_ENV"):
        candidates.append(os.path.join(os.environ["VIRTUAL_ENV"], "bin", "python"))
    candidates += [found for name in ("python", "python3") if (found := shutil.which(name))]
    candidates.append(sys.executable)
    for python in dict.fromkeys(candidates):
        if has_vllm(python):
            return Path(python)
    return None


def find_library(name: str) -> str | None:
    """Return the path of a shared library of the system, such as "libnuma.so.1"."""
    for folder in LIBRARY_FOLDERS:
        found = sorted(glob.glob(f"{folder}/{name}"))
        if found:
            return found[0]
    return None


def _has_venv() -> bool:
    done = subprocess.run(
        [sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False
    )
    return done.returncode == 0


def _has_compiler() -> bool:
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return shutil.which("g++") is not None and os.path.exists(header)


# What may be missing: the Debian packages that bring it, and how to tell.
NEEDS: dict[str, tuple[tuple[str, ...], Callable[[], bool]]] = {
    "venv": (("python3-venv",), _has_venv),
    "tcmalloc": (("libtcmalloc-minimal4",), lambda: bool(find_library("libtcmalloc_minimal.so.4"))),
    "numa": (("libnuma1",), lambda: bool(find_library("libnuma.so.1"))),
    "rdma": (
        ("libibverbs1", "librdmacm1"),
        lambda: all(find_library(f"{name}.so.1") for name in ("libibverbs", "librdmacm")),
    ),
    # torch.compile on a CPU runs a C++ compiler when the model is first called.
    "compiler": (("g++", "python3-dev"), _has_compiler),
}


def ensure_system(needs: Iterable[str]) -> None:
    """Install with apt-get what is missing, and only that.

    Raises:
        SetupError: Something is missing and cannot be installed here.
    """
    missing = [name for name in needs if not NEEDS[name][1]()]
    if not missing:
        return
    packages = [package for name in missing for package in NEEDS[name][0]]
    command = f"apt-get install {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        raise SetupError(
            f"{', '.join(missing)} is missing, and this system has no apt-get to install it with. "
            f"Install what Debian calls {' '.join(packages)} and start again."
        )
    prefix: list[str] = []
    if os.geteuid() != 0:
        if subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode:
            raise SetupError(
                f"{', '.join(missing)} is missing, and only root can install it. "
                f"Run `sudo {command}` and start again."
            )
        prefix = ["sudo", "-n"]
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    apt += ["-o", "DPkg::Lock::Timeout=120"]
    say(f"installing from Debian: {' '.join(packages)}")
    for arguments in (["update"], ["install", "--no-install-recommends", *packages]):
        done = subprocess.run(
            [*apt, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=APT_SECONDS,
            check=False,
        )
        # A broken third-party source fails the update; what we need may be known all the same.
        if done.returncode and arguments != ["update"]:
            raise SetupError(f"`{command}` failed; its last words: {done.stdout.strip()[-600:]}")
    still = [name for name in missing if not NEEDS[name][1]()]
    if still:
        raise SetupError(
            f"{command} succeeded, but {sys.executable} still lacks {', '.join(still)}. "
            "If that is not the system's Python, name the system's in ASCEND_PATCH_PYTHON."
        )
