"""`ascend-patch run -- CMD`: a command whose Python processes are patched, wherever they live.

It needs nothing in the interpreter of the command: PYTHONPATH gets the folder ascend_patch/startup,
whose sitecustomize activates the shim and whose `ascend_patch` leads to this package. The folder
around the package is not exposed: it may be the site-packages of another Python, or a checkout,
whose folder `kernels` has another package's name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from ascend_patch._bootstrap import OFF, VARIABLE, complain

PACKAGE = Path(__file__).resolve().parent
STARTUP_FILES = ("sitecustomize.py", "ascend_patch.py")
# Each of them makes Python ignore PYTHONPATH, or sitecustomize.
CLOSING_SWITCHES = "EIS"


class RunError(Exception):
    """The command was not started; the message is a sentence for the user.

    Attributes:
        status: What a shell would end with: 2 usage, 126 cannot be run, 127 not found.
    """

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def run(words: list[str]) -> NoReturn:
    """Become the command, with the shim activated in each Python that it starts.

    Args:
        words: The command and its arguments; a leading `--` is dropped.

    Raises:
        RunError: There is no command, it cannot be started, or the shim is not whole.
    """
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise RunError("no command is given; write: ascend-patch run -- python -m vllm ...", 2)
    environment = environment_of(dict(os.environ), startup_folder())
    if environment[VARIABLE].strip().lower() in OFF:
        complain(f"{VARIABLE}={environment[VARIABLE]} means off, so {command[0]} runs unpatched")
    switch = _closing_switch(command)
    if switch:
        complain(
            f"{switch} makes Python ignore PYTHONPATH; {command[0]} is patched only if "
            "ascend-patch is installed in that interpreter"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, environment)
    except (OSError, ValueError) as error:
        raise _explained(command[0], error) from error


def environment_of(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """The environment of the command: the folder first on PYTHONPATH, `all` unless said else."""
    before = environment.get("PYTHONPATH", "")
    # An empty entry between others is the working directory, an empty variable is nothing.
    entries = before.split(os.pathsep) if before else []
    path = [str(folder), *(entry for entry in entries if entry != str(folder))]
    return {VARIABLE: "all", **environment, "PYTHONPATH": os.pathsep.join(path)}


def startup_folder() -> Path:
    """The folder for PYTHONPATH that activates this copy of the shim; nothing is written.

    Raises:
        RunError: The folder is not whole, or its path cannot be an entry of PYTHONPATH.
    """
    folder = PACKAGE / "startup"
    if os.pathsep in str(folder):
        raise RunError(
            f"{folder} has a {os.pathsep!r} in its path, which separates the entries of "
            "PYTHONPATH; install ascend-patch in another place",
            126,
        )
    # Inside an archive there are no files; sys.path takes a folder of one as it is.
    zipped = any(parent.is_file() for parent in folder.parents)
    missing = [name for name in STARTUP_FILES if not zipped and not (folder / name).is_file()]
    if missing:
        raise RunError(
            f"{folder} has no {' and no '.join(missing)}; install ascend-patch again", 126
        )
    return folder


def _closing_switch(command: list[str]) -> str | None:
    if not os.path.basename(command[0]).startswith("python"):
        return None
    for word in command[1:]:
        if not word.startswith("-") or word in ("-", "-c", "-m") or word.startswith("--"):
            return None
        for letter in word[1:]:
            if letter in CLOSING_SWITCHES:
                return word
            if letter in "cmWX":
                break
    return None


def _explained(name: str, error: OSError | ValueError) -> RunError:
    if isinstance(error, FileNotFoundError):
        where = "there is no such file" if os.sep in name else "it is not on PATH"
        return RunError(f"{name} cannot be started: {where}", 127)
    hint = f"; write: ascend-patch run -- python {name}" if name.endswith(".py") else ""
    what = getattr(error, "strerror", None) or str(error)
    return RunError(f"{name} cannot be started: {what}{hint}", 126)
