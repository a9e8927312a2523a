"""The servers of these tests: what they run in, how they are set up, what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _server
import logprobs
from _system import find_library
from _tiny_model import make_tiny_model

CHECKOUT = Path(__file__).resolve().parents[2]
FAULT_PLUGIN = Path(__file__).resolve().parent / "fault_plugin"
READY_SECONDS = 400


@dataclass(frozen=True)
class Python:
    """The interpreters that servers run in.

    Attributes:
        patched: Has vLLM and the shim.
        plain: Has vLLM. Without scripts/test it is the same one.
        drop_in: For PYTHONPATH, the shim where `patched` does not have it installed.
        preload: For LD_PRELOAD.
    """

    patched: Path
    plain: Path
    drop_in: str
    preload: str


def find_python() -> Python:
    """Return what scripts/test prepared, or else this interpreter with the checkout dropped in."""
    prepared = os.environ.get("ASCEND_PATCH_E2E_PYTHON")
    if prepared:
        plain = Path(os.environ["ASCEND_PATCH_E2E_PLAIN_PYTHON"])
        return Python(Path(prepared), plain, "", os.environ["ASCEND_PATCH_E2E_PRELOAD"])
    here = Path(sys.executable)
    libraries = [
        find_library("libtcmalloc_minimal.so.4"),
        str(Path(sys.prefix) / "lib/libiomp5.so"),
    ]
    preload = ":".join(path for path in libraries if path and os.path.exists(path))
    return Python(here, here, str(CHECKOUT), preload)


@dataclass(frozen=True)
class Setup:
    """One way to serve the tiny model; `raw_logits` reports logits in place of logprobs."""

    dtype: str = "float32"
    compiled: bool = False
    tensor_parallel: int = 1
    raw_logits: bool = False

    def name(self) -> str:
        """Return a short name for reports."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.dtype} {mode} tp{self.tensor_parallel}"

    def arguments(self) -> list[str]:
        """vLLM's command line. No prefix cache: what one fault has put there outlives it."""
        words = ["--dtype", self.dtype, "--max-model-len", "1024", "--no-enable-prefix-caching"]
        words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        if not self.compiled:
            words.append("--enforce-eager")
        if self.raw_logits:
            words += ["--logprobs-mode", "raw_logits"]
        return words


@dataclass
class Observed:
    """What one server said.

    Attributes:
        answers: To the prompts one after the other.
        together: To all of them in one batch.
        faulty: The same questions with a fault switched on, by its name.
        status: `ascend-patch status --json` of its run, while it was alive.
        started_in: Seconds until it was ready.
    """

    answers: tuple[logprobs.Answer, ...]
    together: tuple[logprobs.Answer, ...]
    status: dict[str, Any] = field(default_factory=dict)
    faulty: dict[str, tuple[logprobs.Answer, ...]] = field(default_factory=dict)
    started_in: float = 0.0


class Lab:
    """Runs servers one after the other; what each said is kept, so each set-up starts once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = find_python()
        self.kept: dict[tuple[Setup, bool], Observed] = {}
        self.models: dict[str, Path] = {}
        self.started = 0
        self.inductor = os.environ.get("ASCEND_PATCH_E2E_INDUCTOR", str(folder / "inductor"))

    def model(self, dtype: str) -> Path:
        if dtype not in self.models:
            self.models[dtype] = make_tiny_model(self.folder / f"model-{dtype}", dtype=dtype)
        return self.models[dtype]

    def unpatched(self, setup: Setup) -> Observed:
        """Return what a server without the shim says."""
        key = (setup, False)
        if key not in self.kept:
            with self.server(setup, patches=None) as server:
                answers = logprobs.ask(server)
                together = logprobs.ask_together(server, answers)
            self.kept[key] = Observed(answers, together, started_in=server.started_in)
        return self.kept[key]

    def patched(self, setup: Setup) -> Observed:
        """Return what a patched server says to the same, and what it says with each fault."""
        key = (setup, True)
        if key not in self.kept:
            lead = self.unpatched(setup).answers
            fault = self.folder / "fault"
            fault.write_text("")
            with self.server(setup, patches="all", fault=fault) as server:
                observed = Observed(
                    answers=logprobs.ask(server, lead),
                    together=logprobs.ask_together(server, lead),
                    started_in=server.started_in,
                )
                observed.status = self.status(server)
                for name in ("sine", "factor"):
                    fault.write_text(name)
                    observed.faulty[name] = logprobs.ask(server, lead)
            self.kept[key] = observed
        return self.kept[key]

    def server(
        self, setup: Setup, *, patches: str | None, fault: Path | None = None, **more: str
    ) -> _server.Server:
        """Return a server, not started; `patches` None runs one that has never seen the shim."""
        name = f"{self.started}-{'plain' if patches is None else 'patched'}"
        self.started += 1
        folder = self.folder / "servers" / name
        env = _server.inherited() | _server.base_variables()
        env |= _server.cpu_variables(setup.tensor_parallel)
        env |= {
            "LD_PRELOAD": self.python.preload,
            "PATH": f"{self.python.plain.parent}:{env.get('PATH', os.defpath)}",
            "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
            # vLLM compiles small functions in eager servers too, 15 s with the first request;
            # inductor's cache goes by the content of a graph, so servers can share it.
            "TORCHINDUCTOR_CACHE_DIR": self.inductor,
        }
        if patches is not None:
            paths = [self.python.drop_in, str(FAULT_PLUGIN) if fault else ""]
            env["PYTHONPATH"] = ":".join(path for path in paths if path)
            env["ASCEND_PATCHES"] = patches
            env["ASCEND_PATCHES_STATUS_DIR"] = str(folder / "status")
            if fault:
                env["E2E_FAULT_FILE"] = str(fault)
        return _server.Server(
            self.python.plain if patches is None else self.python.patched,
            str(self.model(setup.dtype)),
            env=env | more,
            log=folder / "log.txt",
            arguments=setup.arguments(),
            ready_seconds=READY_SECONDS,
        )

    def status(self, server: _server.Server) -> dict[str, Any]:
        """Return the newest run of `ascend-patch status --json`, asked as a user would."""
        env = {k: v for k, v in server.env.items() if k not in ("ASCEND_PATCHES", "LD_PRELOAD")}
        done = subprocess.run(
            [str(server.python), "-m", "ascend_patch", "status", "--json"],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        runs = json.loads(done.stdout)["runs"]
        assert runs, "the server left no status file"
        return runs[0]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition()` came true before the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
