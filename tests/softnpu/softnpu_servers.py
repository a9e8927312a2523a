"""Servers of a vllm-ascend release on the software NPU, and what transformers says to their tokens.

A server picks tokens; transformers then reads the same text in one piece, without a cache, and
gives each token's log-probabilities. So every step counts, whichever token was picked.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _env
import _serve
from _server import Server
from logprobs import TOP, Answer, generate, token_id
from softnpu_environment import Environment

ARGUMENTS = (
    "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "bfloat16",
    "--num-gpu-blocks-override", "128", "--kv-cache-memory-bytes", "134217728",
    "--gpu-memory-utilization", "0.05",
)  # fmt: skip


def tiny_model(npu: Environment, kind: str = "qwen3", dtype: str = "bfloat16") -> Path:
    """Return a tiny random model, kept in the cache."""
    plain = _env.Environment(npu.python, npu.python, "cpu")
    return _serve.tiny_model(plain, kind, dtype)


def server(
    npu: Environment,
    model: Path,
    folder: Path,
    *arguments: str,
    patches: str = "",
    devices: int = 1,
    seconds: float = 300,
    **variables: str,
) -> Server:
    """Return a server that is not started yet; its log and status are in `folder`.

    Args:
        patches: The value of ASCEND_PATCHES; "" serves without the shim.
    """
    env = npu.variables(devices=devices) | variables
    env |= {"ASCEND_PATCHES": patches, "ASCEND_PATCHES_STATUS_DIR": str(folder / "status")}
    return Server(
        npu.python,
        str(model),
        env=env,
        log=folder / "log.txt",
        arguments=[*ARGUMENTS, *arguments],
        ready_seconds=seconds,
    )


@contextlib.contextmanager
def started(servers: Mapping[str, Server]) -> Iterator[None]:
    """Start servers together, each takes one core to start; stop them all."""
    with contextlib.ExitStack() as stack:
        for one in servers.values():
            stack.callback(one.stop)
            one.start()
        for one in servers.values():
            one.wait_until_ready()
        yield


def calls(npu: Environment, folder: Path) -> dict[str, int]:
    """Return how often each applied patch ran in the processes of a server, by its status."""
    env = npu.variables() | {"ASCEND_PATCHES": ""}
    env["ASCEND_PATCHES_STATUS_DIR"] = str(folder / "status")
    done = subprocess.run(
        [str(npu.python), "-m", "ascend_patch", "status"],
        cwd=tempfile.gettempdir(), env=env, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    print(done.stdout)
    found: dict[str, int] = {}
    for patch, count in re.findall(r"(\w+) +applied +(\d+) +\d+ of", done.stdout):
        found[patch] = found.get(patch, 0) + int(count)
    return found


@dataclass(frozen=True)
class Distance:
    """How far log-probabilities are from a reference, over all steps and named tokens."""

    worst: float
    root_mean_square: float


class Reference:
    """A model of transformers, on this machine's CPU.

    Args:
        dtype: The name of a dtype of torch.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    def log_probabilities(self, answer: Answer) -> Any:
        """[steps, vocabulary] float32: before each of an answer's tokens."""
        torch = self.torch
        text = [*answer.prompt, *answer.tokens]
        with torch.inference_mode():
            logits = self.model(torch.tensor([text])).logits[0].float()
        first = len(answer.prompt) - 1
        return logits.log_softmax(-1)[first : first + len(answer.tokens)]

    def distance(self, answers: tuple[Answer, ...]) -> Distance:
        """How far a server's answers are from this model."""
        errors = []
        for answer in answers:
            mine = self.log_probabilities(answer)
            for step, row in zip(answer.steps, mine, strict=True):
                assert len(step) >= TOP
                errors += [abs(value - float(row[token_id(t)])) for t, value in step.items()]
        return _distance(errors)

    def distance_of(self, other: Reference, answers: tuple[Answer, ...]) -> Distance:
        """How far another model of transformers is from this one, at the same tokens."""
        errors = []
        for answer in answers:
            mine, others = self.log_probabilities(answer), other.log_probabilities(answer)
            for step, a, b in zip(answer.steps, mine, others, strict=True):
                errors += [abs(float(a[token_id(t)] - b[token_id(t)])) for t in step]
        return _distance(errors)


def _distance(errors: list[float]) -> Distance:
    return Distance(max(errors), math.sqrt(sum(e * e for e in errors) / len(errors)))


def ask(server: Server, prompts: tuple[str, ...], steps: int = 12) -> tuple[Answer, ...]:
    """Return greedy answers with the log-probabilities of each step's likeliest tokens."""
    found = []
    for text in prompts:
        tokens = server.post("/tokenize", {"model": "model", "prompt": text})["tokens"]
        found.append(generate(server, tuple(tokens), steps))
    return tuple(found)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
