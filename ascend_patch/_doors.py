"""Looks at how Python starts here: which door is open, and what stands in front of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ascend_patch import __version__, _bootstrap, _fresh_process

# What marks a sitecustomize as ours: a user's own may well mention our name.
OUR_IMPORT = "from ascend_patch import _bootstrap"
PTH = "ascend_patch.pth"
ASK_SECONDS = 60
ASK = (
    "import sys; m = sys.modules.get('ascend_patch._bootstrap'); "
    "answer = m and {'doors': m.doors, 'file': m.__file__, 'others': m.other_copies}"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok`, `note` or `wrong`, about what, and a sentence."""

    level: str
    about: str
    text: str


def examine() -> Iterator[Finding]:
    """The doors, the chain of sitecustomize, other copies of the shim, and the .pth file."""
    environ = {**os.environ, _bootstrap.VARIABLE: "all"}
    doors: list[str] = []
    try:
        # Nothing else tells what happens at start-up.
        answer = _fresh_process.ask(ASK, environ=environ, seconds=ASK_SECONDS).value
    except _fresh_process.NoAnswer as error:
        yield Finding("wrong", "door", f"a fresh Python could not be asked: {error}")
    else:
        if answer is None:
            yield Finding(
                "wrong",
                "door",
                "closed: a fresh Python does not load the shim. Install ascend-patch into this "
                "environment, or put its checkout (of `pip install --target DIR`, "
                "DIR/ascend_patch/startup) on PYTHONPATH, or use `ascend-patch run -- CMD`",
            )
        else:
            doors, file, others = answer["doors"], answer["file"], answer["others"]
            yield Finding("ok", "door", f"open, by {' and '.join(doors)}, from {Path(file).parent}")
            for other in others:
                yield _other_copy(Path(other))
    yield from _flags()
    yield from _sitecustomizes(doors)
    yield from _copies()
    yield from _pth_files()


def _flags() -> Iterator[Finding]:
    """What the fresh process did not have, and a server started the same way would."""
    for flag, what in (
        ("no_site", "-S: no door opens in a process started so"),
        ("isolated", "-I: only an installed shim's door opens in a process started so"),
        ("ignore_environment", "-E: PYTHONPATH and ASCEND_PATCHES' own drop-in are not read"),
    ):
        if getattr(sys.flags, flag):
            yield Finding("note", "python", f"this one runs with {what}")


def _sitecustomizes(doors: list[str]) -> Iterator[Finding]:
    found = _sitecustomize_files()
    ours = [path for path in found if OUR_IMPORT in _text(path)]
    if not found:
        yield Finding("note", "sitecustomize", "none on sys.path")
        return
    chain = " -> ".join(map(str, found))
    if ours and found[0] not in ours and not doors:
        yield Finding(
            "wrong",
            "sitecustomize",
            f"{found[0]} shadows ours, and no .pth file opens the door in its place: install "
            f"ascend-patch, or use `ascend-patch run -- CMD`. In order: {chain}",
        )
    elif ours and found[0] not in ours:
        # ddtrace's, for one, runs the next one itself.
        yield Finding(
            "ok",
            "sitecustomize",
            f"{found[0]} comes before ours; the door is open all the same, by "
            f"{' and '.join(doors)}. In order: {chain}",
        )
    else:
        yield Finding("ok", "sitecustomize", chain)


def _sitecustomize_files() -> list[Path]:
    """Every sitecustomize on sys.path, in the order in which Python looks.

    The first entry is the script's folder or the working directory: not yet there at start-up.
    """
    added_later = 0 if getattr(sys.flags, "safe_path", False) else 1
    entries = dict.fromkeys(os.path.abspath(entry) for entry in sys.path[added_later:] if entry)
    files = (
        path
        for entry in entries
        for path in (Path(entry, "sitecustomize", "__init__.py"), Path(entry, "sitecustomize.py"))
    )
    return [path for path in files if path.is_file()]


def _copies() -> Iterator[Finding]:
    """Two copies on sys.path: which of them runs depends on the order."""
    here = Path(__file__).resolve().parent
    seen = {here}
    for entry in sys.path:
        folder = Path(entry or os.curdir)
        startup = folder.name == "startup" and (folder / "ascend_patch.py").is_file()
        path = (folder.parent if startup else folder / "ascend_patch").resolve()
        if path not in seen and (path / "_bootstrap.py").is_file():
            seen.add(path)
            yield _other_copy(path)


def _other_copy(path: Path) -> Finding:
    found = re.search(r'^__version__ = "(.+)"', _text(path / "__init__.py"), re.MULTILINE)
    version = found.group(1) if found else "of unknown version"
    level = "note" if version == __version__ else "wrong"
    advice = "" if level == "note" else "; remove one of them"
    return Finding(
        level,
        "ascend-patch",
        f"another copy, {version}, lies at {path}; this is {__version__}{advice}",
    )


def _pth_files() -> Iterator[Finding]:
    """An editable install whose folder is gone leaves a line that leads nowhere."""
    for entry in sys.path:
        path = Path(entry, PTH)
        if not entry or not path.is_file():
            continue
        for line in _text(path).splitlines():
            folder = line.strip()
            if folder.startswith(os.sep) and not Path(folder).is_dir():
                yield Finding(
                    "wrong",
                    "ascend-patch",
                    f"{path} leads to {folder}, which is gone; install again",
                )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
