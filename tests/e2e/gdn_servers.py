"""Servers with GDN models: how they are set up, what is asked of them, what they show."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _env
import logprobs
from _server import Server, ServerError
from _tiny_model import WORDS, byte_symbols, vocabulary
from gdn_transformers import Oracle
from server import Lab, Setup

PLUGIN = Path(__file__).resolve().parent / "gdn_plugin"
HITS = "vllm:prefix_cache_hits_total"
MAX_TOKENS = 1024
# As few as serve a batch, so that each has many owners.
BLOCKS = 128
# Of attention and of states alike, on a CPU.
BLOCK = 128
# What any number of servers would say again is not worth all steps.
REPEATED_STEPS = 8
# Of a wrong model: each step is about another text, and the first ones show it.
FAULTY_STEPS = 4
FAULTS = ("state", "beta")


def words(count: int, seed: int) -> tuple[int, ...]:
    """Return so many words' tokens, in a random order."""
    tokens, _ = vocabulary()
    known = [tokens[byte_symbols()[ord(" ")] + word] for word in WORDS]
    return tuple(random.Random(seed).choices(known, k=count))


LONG = words(500, 1)
ALONE = (words(1, 2), words(63, 3), words(64, 4), words(65, 5), LONG)
# A prefix of two blocks, and of one, that an earlier prompt had as well.
AGAIN = (LONG[: 2 * BLOCK] + words(45, 6), LONG[:BLOCK] + words(1, 7))
# Asked when every slot has had an owner: what begins there must not go on from what it left.
LATE = (words(1, 8), words(1, 9), words(2, 7))
BATCH = (*(words(n, 10 + n) for n in (1, 2, 63, 64, 65, 290)), *AGAIN)


@dataclass(frozen=True)
class Gdn(Setup):
    """One way to serve a tiny GDN model.

    Attributes:
        chunk: How many tokens a step holds.
        repeats: How often the batch is asked again.
        patches: What ASCEND_PATCHES is set to.
    """

    model: str = "qwen3-next"
    prefix_caching: bool = True
    chunk: int = 160
    repeats: int = 3
    device: str = "cpu"
    patches: str = "gdn_attn"

    def name(self) -> str:
        """Return a short name for reports."""
        cached = ["cached"] * self.prefix_caching
        return " ".join([super().name(), self.device, *cached, f"chunks of {self.chunk}"])

    @property
    def oracle(self) -> str:
        """The kind that transformers is asked about; of Qwen3.5 the Qwen3-Next that it equals."""
        return "qwen3-next-dense" if self.model == "qwen3.5" else self.model

    def arguments(self) -> list[str]:
        """vLLM's command line."""
        parts = ["--dtype", self.dtype, "--max-model-len", str(MAX_TOKENS)]
        parts += ["--tensor-parallel-size", str(self.tensor_parallel), "--max-num-seqs", "16"]
        parts += ["--max-num-batched-tokens", str(self.chunk)]
        parts += ["--num-gpu-blocks-override", str(BLOCKS)]
        parts.append(f"--{'' if self.prefix_caching else 'no-'}enable-prefix-caching")
        if not self.compiled:
            parts.append("--enforce-eager")
        if self.model == "qwen3.5":
            parts += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0})]
        return parts


@dataclass
class Seen:
    """What a patched server said.

    Attributes:
        alone: Answers to ALONE, one request after the other.
        together: To BATCH in one request.
        repeats: To BATCH, each in a request of its own at the same time, again and again.
        late: To LATE, after all of these.
        read: The logprobs of the tokens of ALONE's and BATCH's prompts.
        hits: Tokens that came out of the prefix cache.
        faulty: Answers to ALONE and BATCH with a fault switched on, by its name.
        status: `ascend-patch status --json` of its run, while it was alive.
    """

    alone: tuple[logprobs.Answer, ...] = ()
    together: tuple[logprobs.Answer, ...] = ()
    repeats: list[tuple[logprobs.Answer, ...]] = field(default_factory=list)
    late: tuple[logprobs.Answer, ...] = ()
    read: list[list[float]] = field(default_factory=list)
    hits: float = 0.0
    faulty: dict[str, tuple[logprobs.Answer, ...]] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    started_in: float = 0.0


class GdnLab:
    """Runs servers one after the other; what each said is kept, so each set-up starts once."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.kept: dict[Gdn, Seen | ServerError] = {}
        self.oracles: dict[tuple[str, str], Oracle] = {}

    def oracle(self, setup: Gdn, dtype: str = "float32") -> Oracle:
        key = (setup.oracle, dtype)
        if key not in self.oracles:
            self.oracles[key] = Oracle(self.lab.model(dtype, setup.oracle), dtype)
        return self.oracles[key]

    def patched(self, setup: Gdn) -> Seen:
        """Return what a server with the shim says, and what it says with each fault.

        Raises:
            ServerError: It did not start, or not answer; for each test of it the same.
        """
        if setup not in self.kept:
            try:
                self.kept[setup] = self.hear(setup)
            except ServerError as error:
                self.kept[setup] = error
        found = self.kept[setup]
        if isinstance(found, ServerError):
            raise found
        return found

    def hear(self, setup: Gdn) -> Seen:
        """Start a server, ask it everything, and break it."""
        fault = self.lab.folder / f"gdn-fault-{self.lab.started}"
        fault.write_text("")
        with self.server(setup, fault) as server:
            seen = Seen(started_in=server.started_in)
            # Long before they are shared: what was cached is asked for again.
            seen.alone = one_by_one(server, ALONE)
            seen.together = in_one(server, BATCH)
            seen.read = [read(server, prompt) for prompt in (*ALONE, *BATCH)]
            seen.repeats = [at_once(server, BATCH) for _ in range(setup.repeats)]
            seen.late = one_by_one(server, LATE)
            seen.hits = server.metric(HITS)
            seen.status = self.lab.status(server)
            for name in FAULTS:
                fault.write_text(name)
                seen.faulty[name] = in_one(server, (*ALONE, *BATCH), FAULTY_STEPS)
        return seen

    def server(self, setup: Gdn, fault: Path) -> Server:
        paths = [path for path in (self.lab.python.drop_in, str(PLUGIN)) if path]
        return self.lab.server(
            setup,
            patches="all" if setup.device == "emulated" else setup.patches,
            ASCEND_PATCHES_DEVICE=setup.device,
            ASCEND_PATCHES_STRICT="1",
            E2E_GDN_FAULT_FILE=str(fault),
            PYTHONPATH=":".join(paths),
        )

    def newest(self, setup: Gdn, patches: str | None) -> Seen:
        """Return what a server of the newest release says, with the shim or without."""
        assert setup.release == _env.NEWEST
        with self.lab.server(setup, patches=patches) as server:
            seen = Seen(one_by_one(server, ALONE), in_one(server, BATCH))
            if patches is not None:
                seen.status = self.lab.status(server)
        return seen


def one_by_one(server: Server, prompts: tuple[tuple[int, ...], ...]) -> tuple[logprobs.Answer, ...]:
    """Return an answer to each prompt, one request after the other."""
    return tuple(answer for prompt in prompts for answer in in_one(server, (prompt,)))


def in_one(
    server: Server, prompts: tuple[tuple[int, ...], ...], steps: int = logprobs.STEPS
) -> tuple[logprobs.Answer, ...]:
    """The same in one request, so in one batch."""
    questions = tuple(logprobs.Answer(prompt, (), ()) for prompt in prompts)
    return logprobs.ask_together(server, questions, steps)


def at_once(server: Server, prompts: tuple[tuple[int, ...], ...]) -> tuple[logprobs.Answer, ...]:
    """The beginnings, each in a request of its own, all at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: in_one(server, (prompt,), REPEATED_STEPS), prompts))
    return tuple(answer for answers in found for answer in answers)


def read(server: Server, prompt: tuple[int, ...]) -> list[float]:
    """Return the logprob of each token of a prompt but the first."""
    said = server.complete(list(prompt), max_tokens=1, prompt_logprobs=1)["choices"][0]
    steps = said["prompt_logprobs"][1:]
    return [step[str(token)]["logprob"] for step, token in zip(steps, prompt[1:], strict=True)]
