"""A virtual environment made of four paths, and what its Python says about its start."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What a process says about its start-up. `marks` is where the tests' own files leave their name.
PROBE = """
import sys
boot = sys.modules.get("ascend_patch._bootstrap")
customize = sys.modules.get("sitecustomize")
print("\\n" + repr({
    "doors": boot.doors if boot else [],
    "others": boot.other_copies if boot else [],
    "value": boot.value() if boot else None,
    "from": boot.__file__ if boot else None,
    "armed": sum(type(f).__module__ == "ascend_patch._finder" for f in sys.meta_path),
    "sitecustomize": getattr(customize, "__file__", None),
    "marks": getattr(sys, "marks", []),
    "leftovers": [name for name in vars(sys) if "ascend" in name],
}))
"""
MARK = "import sys; vars(sys).setdefault('marks', []).append({!r})\n"


@dataclass
class House:
    """A virtual environment: its interpreter and its site-packages."""

    python: Path
    site: Path

    @classmethod
    def build(cls, folder: Path, base: str, version: str = "") -> House:
        """Lay out what `python -m venv --without-pip` would, without starting a process."""
        version = version or f"{sys.version_info[0]}.{sys.version_info[1]}"
        site = folder / "lib" / f"python{version}" / "site-packages"
        site.mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "pyvenv.cfg").write_text(
            f"home = {os.path.dirname(base)}\ninclude-system-site-packages = false\n"
        )
        python = folder / "bin" / "python"
        python.symlink_to(base)
        return cls(python, site)

    @classmethod
    def with_pip(cls, folder: Path, base: str) -> House:
        """A virtual environment as the standard library makes it."""
        done = start([base, "-m", "venv", str(folder)])
        assert done.returncode == 0, done.stderr
        (site,) = folder.glob("lib/python3*/site-packages")
        return cls(folder / "bin" / "python", site)

    def pip(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run this environment's pip."""
        return self.run("-m", "pip", "--quiet", "--disable-pip-version-check", *words, **options)

    def install(self, shim: Path) -> None:
        """Put the shim into site-packages, as pip would."""
        shutil.copytree(shim, self.site, dirs_exist_ok=True)

    def run(
        self, *words: str, path: tuple[Path | str, ...] = (), cwd: Path | str = "/", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Start this Python with `words`; `path` becomes PYTHONPATH, ASCEND_PATCHES is unset."""
        return start([str(self.python), *words], path=path, cwd=cwd, **environ)

    def boot(self, *switches: str, patches: str = "all", **options: Any) -> dict[str, Any]:
        """What a process of this Python says about its start, and its stderr as `stderr`."""
        done = self.run(*switches, "-c", PROBE, ASCEND_PATCHES=patches, **options)
        assert done.returncode == 0, done.stderr
        return {**ast.literal_eval(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def base_python() -> str:
    """The interpreter that the one running the tests was made from."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def start(
    words: list[str],
    *,
    path: tuple[Path | str, ...] = (),
    cwd: Path | str = "/",
    timeout: float = 120,
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment without any variable of ours or of Python's."""
    foreign = ("ASCEND_PATCH", "PYTHON", "COV_", "COVERAGE_", "DD_", "OTEL_", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment.update(environ)
    # An empty HOME is no HOME.
    if environment.get("HOME") == "":
        del environment["HOME"]
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def room(folder: Path, code: str) -> Path:
    """A folder with a sitecustomize in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return folder


def copy_shim(root: Path, folder: Path) -> None:
    """Copy what a wheel holds; setup.py builds the same, see test_boot_install.py."""
    ignore = shutil.ignore_patterns("__pycache__")
    # The link ascend_patch/kernels becomes a folder.
    shutil.copytree(root / "ascend_patch", folder / "ascend_patch", ignore=ignore)
    (folder / "ascend_patch.pth").write_text(constant(root / "setup.py", "OPEN_THE_DOOR"))


def constant(file: Path, name: str) -> Any:
    """The value of a constant in a file that cannot be imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{file} has no {name}")
