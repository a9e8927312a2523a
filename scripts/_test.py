"""scripts/test: every check of this repository.

Makes an environment with vLLM (kept for the next time), then runs ruff, mypy and pytest: the tests
that need no server first, then those in tests/e2e, against real vLLM servers with the shim as pip
installs it. Everything after -- goes to pytest.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _env
from _system import SetupError, say

E2E = Path("tests/e2e")
# Interpreters and servers that tests start say themselves what they want patched.
NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONDONTWRITEBYTECODE",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
)


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/test",
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s [--all] [--no-checks] [-- pytest's own arguments]",
    )
    parser.add_argument("--all", action="store_true", help="add the tests marked slow")
    parser.add_argument("--no-checks", action="store_true", help="only pytest, no ruff or mypy")
    args = parser.parse_args(arguments[:split])
    args.pytest = arguments[split + 1 :]
    return args


def variables(env: _env.Environment, newest: _env.Environment | None) -> dict[str, str]:
    """Return the environment of the checks: ours, without what would change their outcome.

    Args:
        env: What checks and most servers run in.
        newest: What servers of the newest release run in.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith("ASCEND_PATCHES")
    }
    found["PATH"] = f"{env.plain.parent}:{found.get('PATH', os.defpath)}"
    for name, one in (("ASCEND_PATCH_E2E", env), ("ASCEND_PATCH_E2E_NEWEST", newest)):
        if one is not None:
            found[f"{name}_PYTHON"] = str(one.python)
            found[f"{name}_PLAIN_PYTHON"] = str(one.plain)
            found[f"{name}_PRELOAD"] = one.preload
    found["ASCEND_PATCH_E2E_INDUCTOR"] = str(_env.cache_root() / "inductor")
    return found


def check(name: str, command: Sequence[str], env: dict[str, str]) -> None:
    began = time.monotonic()
    say(f"{name}: {' '.join(command[2:])}")
    done = subprocess.run(
        command, cwd=_env.CHECKOUT, env=env, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SetupError(f"{name} found what is printed above; no test was run.")
    say(f"{name}: {time.monotonic() - began:.0f} s")


def pytest_command(python: Path, args: argparse.Namespace) -> list[str]:
    """One run, so that one closing line counts everything; servers last, a typo shows first."""
    folders = sorted(
        str(path.relative_to(_env.CHECKOUT))
        for path in (_env.CHECKOUT / "tests").iterdir()
        if path.is_dir() and any(path.rglob("test_*.py"))
    )
    folders.sort(key=lambda folder: Path(folder) == E2E)
    command = [str(python), "-m", "pytest", "--durations=10"]
    if not args.all:
        command += ["-m", "not slow"]
    # pytest runs what it is given: paths of the user's instead of all, never both.
    if not named_paths(args.pytest):
        command += folders
    return [*command, *args.pytest]


def named_paths(arguments: list[str]) -> list[Path]:
    """Return the files and folders that pytest is given."""
    words = [word.partition("::")[0] for word in arguments if not word.startswith("-")]
    return [path for word in words if (path := _env.CHECKOUT / word).exists()]


def newest_environment(args: argparse.Namespace) -> _env.Environment | None:
    """Return where servers of the newest release run; None where no test wants one."""
    e2e = _env.CHECKOUT / E2E
    paths = named_paths(args.pytest)
    if paths and not any(e2e in (path, *path.parents) or path in e2e.parents for path in paths):
        return None
    needed = _env.RELEASES[_env.NEWEST]
    if sys.version_info < needed:
        say(f"no tests with vLLM {_env.NEWEST}: it needs Python {'.'.join(map(str, needed))}")
        return None
    return _env.prepare(device="cpu", release=_env.NEWEST, tests=True)


def run(args: argparse.Namespace) -> int:
    env = _env.prepare(device="cpu", tests=True)
    python, clean = env.plain, variables(env, newest_environment(args))
    if not args.no_checks:
        module = [str(python), "-m"]
        check("ruff check", [*module, "ruff", "check", "."], clean)
        check("ruff format", [*module, "ruff", "format", "--check", "."], clean)
        check("mypy", [*module, "mypy"], clean)
    command = pytest_command(python, args)
    say(" ".join(command))
    with subprocess.Popen(
        command, cwd=_env.CHECKOUT, env=clean, stdin=subprocess.DEVNULL
    ) as process:
        # Ctrl-C reaches pytest by itself, SIGTERM does not; either way it stops its servers.
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def main() -> int:
    try:
        return run(parse(sys.argv[1:]))
    except SetupError as error:
        print(f"ascend-patch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
