"""Creates virtual environments and installs into them, with uv, as pip is set up on the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

from _system import SetupError

UV = "uv==0.13.8"
INSTALL_SECONDS = 2400
NOT_PACKED = shutil.ignore_patterns("__pycache__", "*.py[co]", "*.egg-info")


def create(venv: Path, cache: Path) -> None:
    """Make an empty virtual environment with this interpreter, in place of whatever is there."""
    if venv.exists():
        shutil.rmtree(venv)
    venv.parent.mkdir(parents=True, exist_ok=True)
    uv = _uv(cache)
    _run([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(venv)], cache)


def install(
    venv: Path,
    requirements: Path,
    cache: Path,
    *,
    overrides: Path | None = None,
    dependencies: bool = True,
) -> None:
    """Install a requirements file, byte-compiled: without .pyc files `import vllm` takes 53 s."""
    command = [_uv(cache), "pip", "install", "--quiet", "--compile-bytecode"]
    command += ["--python", str(venv / "bin/python"), "-r", str(requirements)]
    if overrides is not None:
        command += ["--overrides", str(overrides)]
    if not dependencies:
        command.append("--no-deps")
    _run(command, cache)


def install_folder(folder: Path, requirement: str, cache: Path, *, python: Path) -> None:
    """Install one package, without what it depends on, into a folder for PYTHONPATH."""
    command = [_uv(cache), "pip", "install", "--quiet", "--no-deps", "--compile-bytecode"]
    _run([*command, "--python", str(python), "--target", str(folder), requirement], cache)


def install_checkout(venv: Path, checkout: Path, cache: Path, *, build_python: Path) -> None:
    """Install the checkout as pip would, built from a copy so that nothing is written into it."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = _build_wheel(build_python / "bin/python", checkout, Path(folder), env=_clean())
        command = [_uv(cache), "pip", "install", "--quiet", "--no-deps", "--compile-bytecode"]
        _run([*command, "--python", str(venv / "bin/python"), str(wheel)], cache)


def install_into_theirs(python: Path, checkout: Path) -> str:
    """Install the shim, and nothing else that is there already, into the user's environment.

    Returns why it could not be done, or an empty string.
    """
    missing = [name for name in ("wrapt", "packaging") if not _has_module(python, name)]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_sources(checkout, Path(folder) / "source")
        # --force-reinstall: the version may be the one of sources that have changed since.
        arguments = ["--no-deps", "--no-build-isolation", "--force-reinstall", str(copy)]
        commands = [[*pip, *arguments]]
        if missing:
            commands.insert(0, [*pip, *missing])
        for command in commands:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
                env=_clean(keep_path=True),
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["pip said nothing"]
                return lines[-1].removeprefix("ERROR: ")[:200]
    return ""


def copy_sources(checkout: Path, to: Path) -> Path:
    """Copy what a build reads; setuptools writes into the folder that it builds."""
    to.mkdir(parents=True)
    for path in checkout.iterdir():
        if path.name in ("ascend_patch", "kernels"):
            shutil.copytree(path, to / path.name, symlinks=True, ignore=NOT_PACKED)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, to / path.name)
    return to


def site_packages(venv: Path) -> Path:
    """Return the environment's site-packages."""
    (found,) = venv.glob("lib/python3.*/site-packages")
    return found


def _build_wheel(python: Path, checkout: Path, folder: Path, env: dict[str, str]) -> Path:
    copy = copy_sources(checkout, folder / "source")
    # setuptools' own PEP 517 entry point: the environment has setuptools, and needs no pip.
    code = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [str(python), "-c", code, str(folder)],
        cwd=copy,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SetupError(f"The shim cannot be built: {done.stderr.strip()[-800:]}")
    return wheels[0]


def _has_module(python: Path, name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([str(python), "-c", code], cwd=empty, timeout=60, check=False)
    return done.returncode == 0


def _uv(cache: Path) -> str:
    """Return uv, installed by pip into an environment of its own when it is first needed."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    home = cache / "bootstrap" / f"py{version}-{UV.replace('==', '-')}"
    uv, marker = home / "bin/uv", home / "complete"
    if not marker.exists():
        shutil.rmtree(home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(home)], cache)
        _run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", UV], cache)
        marker.touch()
    return str(uv)


def _clean(*, keep_path: bool = False) -> dict[str, str]:
    """The environment without what would send Python, pip or a patch elsewhere."""
    env = dict(os.environ)
    drop = ["PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"]
    drop += ["ASCEND_PATCHES", "LD_PRELOAD"]
    if not keep_path:
        drop += ["PYTHONPATH", "VIRTUAL_ENV"]
    for name in drop:
        env.pop(name, None)
    return env


def _uv_settings(home: Path) -> dict[str, str]:
    """What pip is told about indexes and certificates, for uv, which does not read pip's files."""
    if any(name in os.environ for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX")):
        return {}
    done = subprocess.run(
        [str(home), "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        env=_clean(),
        timeout=60,
        check=False,
    )
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        # The environment's own settings come first in pip too, and are listed first.
        found.setdefault(name.rpartition(".")[2].strip(), value.strip().strip("'\""))
    settings = {
        "UV_DEFAULT_INDEX": found.get("index-url", ""),
        "UV_INDEX": " ".join(
            url for url in found.get("extra-index-url", "").split() if _there(url)
        ),
        "UV_FIND_LINKS": ",".join(u for u in found.get("find-links", "").split() if _there(u)),
        "SSL_CERT_FILE": found.get("cert", ""),
        # pip looks for the best version in all of them, uv in the first that has the name.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    return {name: value for name, value in settings.items() if value and name not in os.environ}


def _there(url: str) -> bool:
    """Whether a local folder exists: pip passes over those that do not, and uv fails."""
    parts = urlparse(url)
    return parts.scheme not in ("", "file") or os.path.exists(unquote(parts.path))


def _run(command: list[str], cache: Path) -> None:
    env = _clean()
    if command[0].endswith("/uv"):
        env |= _uv_settings(Path(command[0]).with_name("python"))
        env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_HTTP_TIMEOUT": "300"}
    try:
        done = subprocess.run(
            command,
            cwd=cache if cache.exists() else None,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"`{' '.join(command)}` did not end in {INSTALL_SECONDS // 60} minutes; is the package "
            "index reachable?"
        ) from error
    if done.returncode:
        raise SetupError(f"`{' '.join(command)}` failed: {done.stdout.strip()[-1500:]}")
