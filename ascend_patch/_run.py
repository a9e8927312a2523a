"""`ascend-patch run -- CMD`: a command whose Python processes open the door, wherever they live.

It needs nothing in the interpreter of the command: PYTHONPATH gets a folder that holds links to
our sitecustomize and to this package, and nothing else. Not our site-packages, which may belong to
another Python, and not the checkout, whose folder `kernels` is another package's name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from ascend_patch._bootstrap import OFF, RUN_FOLDER, VARIABLE, complain

PACKAGE = Path(__file__).resolve().parent
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
    """Become the command, with the door open in each Python that it starts.

    Args:
        words: The command and its arguments; a leading `--` is dropped.

    Raises:
        RunError: There is no command, it cannot be started, or the shim is not whole.
    """
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise RunError("no command is given; write: ascend-patch run -- python -m vllm ...", 2)
    environment = environment_of(dict(os.environ), door_folder())
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
    before = environment.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(folder), *(entry for entry in before if entry and entry != str(folder))]
    return {VARIABLE: "all", **environment, "PYTHONPATH": os.pathsep.join(path)}


def door_folder() -> Path:
    """The folder for PYTHONPATH, made if need be and kept: servers outlive this command.

    Its name has a digest of where this package lies, so that each copy has its own.

    Raises:
        RunError: The shim is not whole, or no place for the folder can be written.
    """
    sitecustomize = _our_sitecustomize()
    if not sitecustomize.is_file():
        # A zipped shim: an archive takes part in sys.path as it is, and holds nothing else.
        return sitecustomize.parent
    links = {"ascend_patch": PACKAGE, "sitecustomize.py": sitecustomize}
    name = f"{RUN_FOLDER}-{hashlib.sha256(os.fsencode(PACKAGE)).hexdigest()[:12]}"
    refusals = []
    for base in _bases():
        folder = base / name
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_made(folder, links):
                _make(folder, links)
            return folder
        except OSError as error:
            refusals.append(f"{folder}: {error.strerror or error}")
    raise RunError(
        "no folder for PYTHONPATH can be made; set XDG_CACHE_HOME to a directory of yours "
        f"({'; '.join(refusals)})",
        126,
    )


def _our_sitecustomize() -> Path:
    path = PACKAGE.parent / "sitecustomize.py"
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is not None:
        return path
    try:
        ours = "from ascend_patch import" in path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); install again", 126) from error
    if not ours:
        raise RunError(f"another package has replaced {path}; install ascend-patch again", 126)
    return path


def _bases() -> list[Path]:
    # A cache before the temporary directory: some systems empty that under a running server.
    cache = os.environ.get("XDG_CACHE_HOME", "").strip()
    home = os.path.expanduser("~")
    found = []
    if cache:
        found.append(Path(cache) / "ascend-patch")
    if os.path.isabs(home) and os.path.isdir(home):
        found.append(Path(home) / ".cache" / "ascend-patch")
    return [*found, Path(tempfile.gettempdir()) / f"ascend-patch-{os.getuid()}"]


def _is_made(folder: Path, links: dict[str, Path]) -> bool:
    """Whether the folder is there, ours, and leads where it should.

    Raises:
        OSError: Somebody else could put a sitecustomize of theirs into it.
    """
    for path in (folder.parent, folder):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
        writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or writable:
            raise OSError(errno.EPERM, "it is not a directory that only you can write")
    made = {entry.name: os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()}
    return made == {name: str(target) for name, target in links.items()}


def _make(folder: Path, links: dict[str, Path]) -> None:
    # Whole or not at all: another `run` may be looking at the same time.
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, target in links.items():
            (part / name).symlink_to(target)
        if folder.exists():
            shutil.rmtree(folder)
        try:
            part.rename(folder)
        except OSError:
            if not _is_made(folder, links):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
