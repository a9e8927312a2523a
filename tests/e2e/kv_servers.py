"""Pairs of servers: how they are set up, what is asked, and what one server says to the same."""

from __future__ import annotations

import http.client
import json
import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _disaggregated
import _server
import kv_models
import logprobs
from _disaggregated import Pair, Sizes
from _server import Server, ServerError
from _tiny_model import SPECIAL, make_tiny_model
from server import READY_SECONDS, Lab

PLUGIN = Path(__file__).resolve().parent / "kv_plugin"
# Around a block of 128 tokens, and several of them.
LENGTHS = (1, 127, 128, 129, 500)
STEPS = 8
HITS = "vllm:external_prefix_cache_hits_total"
USED = "vllm:kv_cache_usage_perc"
PREEMPTED = "vllm:num_preemptions_total"
# Bytes and pieces of words; behind the special tokens.
VOCABULARY = range(len(SPECIAL), 300)
SECONDS = 90


@dataclass(frozen=True)
class Transfer:
    """One way to run a pair.

    Attributes:
        emulated: The NHD caches of the emulated device; else vLLM's own CPU attention, HND.
        policy: kv_load_failure_policy.
        extra: More of kv_connector_extra_config.
        variables: More of the environment of both.
        arguments: More of the command line of both.
    """

    sizes: Sizes
    kv_heads: int = 2
    emulated: bool = False
    policy: str = ""
    extra: tuple[tuple[str, Any], ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()

    def name(self) -> str:
        """Return a short name for reports."""
        layout = "NHD" if self.emulated else "HND"
        return f"{self.sizes}, {self.kv_heads} KV heads, {layout}"

    @property
    def merges(self) -> bool:
        """Whether a decode block is made of several shards."""
        held = max(1, self.kv_heads // self.sizes.prefill)
        return self.emulated and max(1, self.kv_heads // self.sizes.decode) > held


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return so many tokens."""
    draw = random.Random(1000 * seed + length)
    return tuple(draw.choice(VOCABULARY) for _ in range(length))


class Asked:
    """The pair as `logprobs` asks a server: through prefill and then decode."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def complete(self, asked: Any, **options: Any) -> Any:
        """Ask both."""
        return self.pair.complete(asked, seconds=SECONDS, **options)


def answer(server: Any, asked: tuple[int, ...], steps: int = STEPS) -> logprobs.Answer:
    """Return what a server, or a pair, says to a prompt."""
    return logprobs.generate(server, asked, steps)


def answers(server: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Any:
    """Return what a server, or a pair, says to prompts of these lengths."""
    return tuple(answer(server, prompt(length, seed)) for length in lengths)


def follow(server: Any, lead: tuple[logprobs.Answer, ...]) -> tuple[logprobs.Answer, ...]:
    """Return what a server says at each step of the answers."""

    def go_on(one: logprobs.Answer, said: tuple[int, ...], count: int) -> logprobs.Answer:
        return logprobs.generate(server, (*one.prompt, *said), count)

    return tuple(logprobs.follow(one, go_on) for one in lead)


def at_once(server: Any, count: int) -> tuple[logprobs.Answer, ...]:
    """Return what a server says to so many prompts, each in a request of its own, at once."""
    asked = [prompt(LENGTHS[i % len(LENGTHS)] + i, seed=7) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return tuple(pool.map(lambda one: answer(server, one), asked))


def abandon(pair: Pair, asked: tuple[int, ...], seconds: float) -> None:
    """Ask decode for a request that was prefilled, and hang up."""
    transfer = uuid.uuid4().hex
    payload = {"model": "model", "prompt": list(asked), "temperature": 0, "max_tokens": STEPS}
    asked_first = _disaggregated.prefill_payload(payload, transfer)
    pair.prefill.post("/v1/completions", asked_first, SECONDS)
    payload["kv_transfer_params"] = pair.decode_parameters(transfer)
    connection = http.client.HTTPConnection(_server.HOST, pair.decode.port, timeout=SECONDS)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(payload), headers)
    time.sleep(seconds)
    connection.close()


@dataclass
class Storm:
    """What became of requests under faults.

    Attributes:
        right: Answered as one server answers.
        wrong: The largest difference of the others that were answered.
        failed: Answered with an error.
        abandoned: Nobody waited for an answer.
        slowest: Seconds of the slowest answer.
    """

    right: int = 0
    wrong: list[float] = field(default_factory=list)
    failed: int = 0
    abandoned: int = 0
    slowest: float = 0.0


def storm(pair: Pair, faults: Path, count: int, tolerance: float) -> Storm:
    """Ask for so many requests, eight at a time, while the faults change and clients hang up."""
    kinds = ("messages", "refuse", "")
    lead = answers(pair.prefill, (40, 130, 260), seed=3)
    found = Storm()

    def one(number: int) -> None:
        if number % 4 == 0:
            (faults / "fault").write_text(kinds[number // 4 % len(kinds)])
        wanted = lead[number % len(lead)]
        if number % 5 == 4:
            abandon(pair, wanted.prompt, 0.01 * (number % 7))
            found.abandoned += 1
            return
        began = time.monotonic()
        try:
            said = answer(Asked(pair), wanted.prompt)
        except ServerError:
            found.failed += 1
        else:
            worst = logprobs.compare(*logprobs.until_parted((wanted,), (said,))).worst
            if worst <= tolerance:
                found.right += 1
            else:
                found.wrong.append(worst)
        found.slowest = max(found.slowest, time.monotonic() - began)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(count)))
    (faults / "fault").write_text("")
    return found


def blocks_are_free(server: Server, seconds: float = 20) -> bool:
    """Whether no block of the cache is in use, once the server was stepped again.

    vLLM looks at what a connector has finished when it computes something.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        server.complete([5, 6], max_tokens=1)
        if server.metric(USED) == 0:
            return True
        time.sleep(0.5)
    return False


def states(lab: Lab, server: Server) -> set[str]:
    """The states of the patch in the engine and the workers of the newest run of a server."""
    return {
        patch["state"]
        for process in lab.status(server)["processes"]
        if process["role"] != "front end"
        for patch in process["patches"]
        if patch["id"] == "kv_connector"
    }


class TransferLab:
    """Starts pairs, one at a time."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.started = 0
        self.models: dict[int, Path] = {}

    def model(self, kv_heads: int) -> Path:
        """Return a tiny model's folder."""
        if kv_heads not in self.models:
            folder = self.lab.folder / f"model-kv{kv_heads}"
            kind = kv_models.qwen3(kv_heads)
            self.models[kv_heads] = make_tiny_model(folder, kind, dtype="float32")
        return self.models[kv_heads]

    @contextmanager
    def pair(self, setup: Transfer, *, patches: str = "all") -> Iterator[tuple[Pair, Path]]:
        """Run a pair; yields it and the folder of its faults."""
        folder = self.lab.folder / f"kv-{self.started}"
        self.started += 1
        (folder / "faults").mkdir(parents=True)
        python = self.lab.python
        engine = _disaggregated.engine_folder(python.plain)
        paths = [python.drop_in, str(PLUGIN), str(engine)]
        env = _server.inherited() | _server.base_variables()
        env |= {
            "LD_PRELOAD": python.preload,
            "PATH": f"{python.plain.parent}:{env.get('PATH', '')}",
            "PYTHONPATH": ":".join(path for path in paths if path),
            "ASCEND_PATCHES": patches,
            "ASCEND_PATCHES_DEVICE": "emulated" if setup.emulated else "cpu",
            "ASCEND_PATCHES_STATUS_DIR": str(folder / "status"),
            "VLLM_CACHE_ROOT": str(self.lab.folder / "vllm-cache-kv"),
            "TORCHINDUCTOR_CACHE_DIR": self.lab.inductor,
            "E2E_KV_FOLDER": str(folder / "faults"),
        }
        words = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
        pair = _disaggregated.make_pair(
            python.patched,
            str(self.model(setup.kv_heads)),
            setup.sizes,
            env=env | dict(setup.variables),
            folder=folder,
            arguments=[
                *words,
                "--no-enable-prefix-caching",
                "--max-num-seqs",
                "32",
                *setup.arguments,
            ],
            extra=dict(setup.extra),
            policy=setup.policy,
            ready_seconds=READY_SECONDS,
        )
        with pair:
            yield pair, folder / "faults"
