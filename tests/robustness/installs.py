"""Ways to install the shim without a package index, and a server of a fake vLLM in each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "boot"))

from house import ROOT, House, base_python, start

STARTUP = ("ascend_patch", "startup")
SYSTEM = [
    (f"/usr/bin/{own.parent.name}", own.parent.name.removeprefix("python"))
    for own in sorted(Path("/usr/lib").glob("python3.1[0-2]/sitecustomize.py"))
    if Path("/usr/bin", own.parent.name).exists()
]
SECONDS = 120
# What each process of a server says of itself: a front end, and the engine that it spawns.
SERVER = """
import importlib.util, json, multiprocessing, sys

def say(queue):
    import vllm
    boot = sys.modules.get("ascend_patch._bootstrap")
    found = {"marks": getattr(sys, "marks", []), "doors": boot.doors if boot else [],
             "kernels": importlib.util.find_spec("kernels") is not None, "problems": None}
    if boot:
        import ascend_patch
        found["others"] = boot.other_copies
        found["problems"] = ascend_patch.status()["problems"]
        found["patches"] = len(ascend_patch.status()["patches"])
    queue.put(found)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    say(queue)
    found = [queue.get(timeout=60)]
    engine = spawn.Process(target=say, args=(queue,), name="EngineCore")
    engine.start()
    found.append(queue.get(timeout=60))
    engine.join()
    print(json.dumps(found))
"""
OTHER = "import sys; vars(sys).setdefault('marks', []).append('other')\n"
# The line of ascend_patch.pth as it was written by installs up to 0.1.0, byte for byte.
OLDER_LINE = (
    "import os; os.environ.get('ASCEND_PATCHES', '').strip().lower() in "
    "('', 'none', '0', 'off', 'false', 'no') or exec(\"try:\\n from ascend_patch._bootstrap import "
    "open_door\\n open_door('pth')\\nexcept KeyboardInterrupt:\\n raise\\nexcept BaseException:\\n "
    'pass")\n'
)


@dataclass
class Way:
    """How a server is started: with which Python, PYTHONPATH and command before it."""

    house: House
    path: tuple[Path, ...] = ()
    before: tuple[str, ...] = ()
    marks: list[str] = field(default_factory=list)

    def serve(self, folder: Path) -> list[dict]:
        """Start the server of a fake vLLM; what its two processes say."""
        package = folder / "server" / "vllm"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("__version__ = '0.18.0'\n")
        (package / "_version.py").write_text("__version__ = '0.18.0'\n")
        script = package.parent / "server.py"
        script.write_text(SERVER)
        done = start(
            [*self.before, str(self.house.python), str(script)],
            path=self.path,
            ASCEND_PATCHES="all",
            ASCEND_PATCHES_DEVICE="cpu",
            ASCEND_PATCHES_STATUS_DIR=str(folder / "status"),
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == 2
        return found


class Workshop:
    """Builds wheels of the shim and installs them with a pip that has no index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tool = House.with_pip(folder / "tool", base_python())
        self.source = folder / "source"
        self.source.mkdir()
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in ("ascend_patch", "kernels"):
            shutil.copytree(ROOT / name, self.source / name, symlinks=True, ignore=ignore)
        for path in ROOT.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copy(path, self.source, follow_symlinks=False)
        self.wheel = self._build("build_wheel")
        self.editable = self._build("build_editable")
        self.houses = 0

    def _build(self, hook: str) -> Path:
        out = self.folder / hook
        out.mkdir()
        code = f"import setuptools.build_meta as b, sys; b.{hook}(sys.argv[1])"
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ASCEND"))}
        done = subprocess.run(
            [sys.executable, "-c", code, str(out)],
            cwd=self.source,
            env=environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (wheel,) = out.glob("*.whl")
        return wheel

    def house(self, base: str = "", version: str = "", needs: bool = True) -> House:
        """A new virtual environment, with what the shim needs copied into it."""
        self.houses += 1
        house = House.build(self.folder / f"house-{self.houses}", base or base_python(), version)
        if needs:
            copy_needs(house.site)
        return house

    def pip(self, house: House, *words: str) -> str:
        """Run pip for that environment, offline."""
        words = ("--python", str(house.python), *words)
        done = self.tool.pip(*words, PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def install(self, house: House, wheel: Path, *words: str) -> None:
        self.pip(house, "install", "--no-deps", *words, str(wheel))

    def other_distribution(self) -> Path:
        """The wheel of another distribution, which is a sitecustomize.py."""
        return write_wheel(self.folder, "other", "1.0", {"sitecustomize.py": OTHER.encode()})

    def older_wheel(self) -> Path:
        """A wheel as they were once: a sitecustomize.py beside the packages, and the older line."""
        with zipfile.ZipFile(self.wheel) as archive:
            names = [
                n for n in archive.namelist() if ".dist-info/" not in n and "startup/" not in n
            ]
            files = {name: archive.read(name) for name in names}
        files["ascend_patch.pth"] = OLDER_LINE.encode()
        files["sitecustomize.py"] = b"from ascend_patch import _bootstrap\n"
        return write_wheel(self.folder, "ascend_patch", "0.0.9", files)


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """Write a wheel of pure Python that holds these files."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, data)
    return wheel


def copy_needs(site: Path) -> None:
    """Copy wrapt and packaging out of the tests' own environment."""
    for name in ("wrapt", "packaging"):
        folder = Path(importlib.util.find_spec(name).origin).parent
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, site / name, ignore=ignore)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its relative path, with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def wheel(workshop):
    house = workshop.house()
    workshop.install(house, workshop.wheel)
    return Way(house)


def beside_another(workshop):
    house = workshop.house()
    workshop.install(house, workshop.other_distribution())
    workshop.install(house, workshop.wheel)
    return Way(house, marks=["other"])


def target(workshop):
    house = workshop.house(needs=False)
    folder = workshop.folder / f"target-{workshop.houses}"
    workshop.install(house, workshop.wheel, "--target", str(folder))
    copy_needs(folder)
    return Way(house, path=(folder, folder.joinpath(*STARTUP)))


def editable(workshop):
    house = workshop.house()
    workshop.install(house, workshop.editable)
    return Way(house)


def checkout(workshop):
    return Way(workshop.house(), path=(ROOT,))


def startup_of_a_checkout(workshop):
    return Way(workshop.house(), path=(ROOT.joinpath(*STARTUP),))


def run(workshop):
    installed = wheel(workshop).house
    command = installed.python.with_name("ascend-patch")
    return Way(workshop.house(), before=(str(command), "run", "--"))


def system(workshop):
    if not SYSTEM:
        pytest.skip("no system Python 3.10 to 3.12 with a sitecustomize of its own is here")
    house = workshop.house(*SYSTEM[0])
    workshop.install(house, workshop.wheel)
    return Way(house)


WAYS = [wheel, beside_another, target, editable, checkout, startup_of_a_checkout, run, system]
