"""The servers of these tests: what they run in, how they are set up, what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _env
import _server
import images
import logprobs
from _tiny_model import make_tiny_model
from _tiny_weights import KINDS
from interpreters import find_python, path_for_images

FAULT_PLUGIN = Path(__file__).resolve().parent / "fault_plugin"
READY_SECONDS = 400
# Of fault_plugin; where there are images, also what strikes only one of the two rotations.
FAULTS = ("sine", "factor")
IMAGE_FAULTS = ("sine", "factor", "mrope-sine", "mrope-axes", "vision-sine")


@dataclass(frozen=True)
class Setup:
    """One way to serve a tiny model; `raw_logits` reports logits in place of logprobs."""

    dtype: str = "float32"
    compiled: bool = False
    tensor_parallel: int = 1
    raw_logits: bool = False
    model: str = "qwen3"
    release: str = _env.DEFAULT

    def name(self) -> str:
        """Return a short name for reports."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.release} {self.model} {self.dtype} {mode} tp{self.tensor_parallel}"

    @property
    def images(self) -> bool:
        return KINDS[self.model].images

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is asked; where positions are scaled, long texts too; beside images, fewer."""
        if self.images:
            return logprobs.PROMPTS[:6]
        longer = logprobs.LONG_PROMPTS if self.model.endswith("yarn") else ()
        return (*logprobs.PROMPTS, *longer)

    def arguments(self) -> list[str]:
        """vLLM's command line. No prefix cache: what one fault has put there outlives it."""
        words = ["--dtype", self.dtype, "--max-model-len", "2048", "--no-enable-prefix-caching"]
        words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        if self.images:
            # Nor one of images.
            words += ["--mm-processor-cache-gb", "0"]
            words += ["--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0})]
        if not self.compiled:
            words.append("--enforce-eager")
        if self.raw_logits:
            words += ["--logprobs-mode", "raw_logits"]
        return words

    def ask(
        self, server: _server.Server, lead: tuple[logprobs.Answer, ...] | None = None
    ) -> tuple[logprobs.Answer, ...]:
        """Return the answers to all prompts, then to the questions about images if it sees any."""
        count = len(self.prompts)
        answers = logprobs.ask(server, lead and lead[:count], self.prompts)
        if self.images:
            answers += images.ask(server, lead and lead[count:])
        return answers


@dataclass
class Observed:
    """What one server said.

    Attributes:
        answers: To the prompts one after the other, and to questions about images.
        together: To the prompts in one batch.
        faulty: The first steps of the answers with a fault switched on, by its name.
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
        self.models: dict[tuple[str, str], Path] = {}
        self.started = 0
        self.inductor = os.environ.get("ASCEND_PATCH_E2E_INDUCTOR", str(folder / "inductor"))

    def model(self, dtype: str, kind: str = "qwen3") -> Path:
        key = (kind, dtype)
        if key not in self.models:
            folder = self.folder / f"model-{kind}-{dtype}"
            self.models[key] = make_tiny_model(folder, kind, dtype=dtype)
        return self.models[key]

    def unpatched(self, setup: Setup) -> Observed:
        """Return what a server without the shim says."""
        key = (setup, False)
        if key not in self.kept:
            with self.server(setup, patches=None) as server:
                answers = setup.ask(server)
                together = logprobs.ask_together(server, answers[: len(setup.prompts)])
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
                    answers=setup.ask(server, lead),
                    together=logprobs.ask_together(server, lead[: len(setup.prompts)]),
                    started_in=server.started_in,
                )
                observed.status = self.status(server)
                for name in IMAGE_FAULTS if setup.images else FAULTS:
                    fault.write_text(name)
                    observed.faulty[name] = setup.ask(server, logprobs.heads(lead))
            self.kept[key] = observed
        return self.kept[key]

    def server(
        self, setup: Setup, *, patches: str | None, fault: Path | None = None, **more: str
    ) -> _server.Server:
        """Return a server, not started; `patches` None runs one that has never seen the shim."""
        python = self.python if setup.release == _env.DEFAULT else find_python(setup.release)
        name = f"{self.started}-{'plain' if patches is None else 'patched'}"
        self.started += 1
        folder = self.folder / "servers" / name
        # What an eager server keeps is what it found out about its model's class, for 10 s; a
        # compiled one's graphs are its own, so that it shows what it makes of them.
        cache = folder if setup.compiled else self.folder
        env = _server.inherited() | _server.base_variables()
        env |= _server.cpu_variables(setup.tensor_parallel)
        env |= {
            "LD_PRELOAD": python.preload,
            "PATH": f"{python.plain.parent}:{env.get('PATH', os.defpath)}",
            "VLLM_CACHE_ROOT": str(cache / f"vllm-cache-{setup.release}"),
            # vLLM compiles small functions in eager servers too, 15 s with the first request;
            # inductor's cache goes by the content of a graph, so servers can share it.
            "TORCHINDUCTOR_CACHE_DIR": self.inductor,
        }
        paths = path_for_images(setup.release) if setup.images else []
        if patches is not None:
            paths += [path for path in (python.drop_in, str(FAULT_PLUGIN) * bool(fault)) if path]
            env["ASCEND_PATCHES"] = patches
            env["ASCEND_PATCHES_STATUS_DIR"] = str(folder / "status")
            if fault:
                env["E2E_FAULT_FILE"] = str(fault)
        if paths:
            env["PYTHONPATH"] = ":".join(paths)
        return _server.Server(
            python.plain if patches is None else python.patched,
            str(self.model(setup.dtype, setup.model)),
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
