"""Why a vLLM server failed, read from its log."""

from __future__ import annotations

import re

# The name of the process, and what vLLM's logger puts before a line.
PREFIX = re.compile(
    r"^(?:\((?P<process>[\w-]+(?: \S+)* pid=\d+)\) )?"
    r"(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
EXCEPTION = re.compile(
    r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Failure|Refused)\b(?::|$)"
)
TRACEBACK = "Traceback (most recent call last):"
# Exceptions that only point to that of another process.
POINTERS = re.compile(
    r"root cause|EngineCore encountered an issue|EngineDeadError|initialization failed", re.I
)
# What a server whose engine is gone has said, though its front end may go on running.
FATAL = (
    "EngineCore failed to start.",
    "EngineCore encountered a fatal error.",
    "EngineCore encountered an issue.",
    "Engine core initialization failed.",
    "WorkerProc failed to start.",
)
# `python -m ...: error: ...` of a command line that vLLM does not take.
USAGE = re.compile(r": error: .+")
MORE_LINES = 3
LONGEST = 500


def is_fatal(text: str) -> bool:
    """Whether the log says that the engine is gone."""
    return any(sentence in text for sentence in FATAL)


def cause(text: str) -> str:
    """The exception that ended the server, as one line; empty where the log has none.

    An exception that points to that of another process is passed over: the front end's last one
    says nothing else, and the engine's is far above it.
    """
    found = _exceptions(text)
    causes = [one for one in found if not POINTERS.search(one)]
    if causes:
        return causes[-1]
    if found:
        return found[-1]
    usage = [line for line in text.splitlines() if USAGE.search(line)]
    return usage[-1].strip()[:LONGEST] if usage else ""


def _exceptions(text: str) -> list[str]:
    """The last lines of all tracebacks, in order, without the same one twice."""
    # Processes write in turns, so each has a traceback of its own.
    inside: dict[str, bool] = {}
    found: list[str] = []
    last: dict[str, int] = {}
    for line in text.splitlines():
        match = PREFIX.match(line)
        assert match is not None
        process, rest = match["process"] or "", line[match.end() :]
        if rest.startswith(TRACEBACK):
            inside[process] = True
            last.pop(process, None)
        elif inside.get(process) and EXCEPTION.match(rest):
            inside[process] = False
            last[process] = len(found)
            found.append(rest.strip())
        elif process in last:
            # Some exceptions say in the next lines what is wrong: pydantic's "1 validation error".
            if rest.startswith((" ", "\t")) and found[last[process]].count(" | ") < MORE_LINES:
                found[last[process]] += f" | {rest.strip()}"
            else:
                last.pop(process)
    return list(dict.fromkeys(one[:LONGEST] for one in found))
