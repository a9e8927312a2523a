"""Servers on the emulated device: how they are set up, what is asked of them, what they show."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import logprobs
from _server import Server
from _tiny_model import WORDS
from server import Lab, Setup

PLUGIN = Path(__file__).resolve().parent / "attention_plugin"
MAX_TOKENS = 1024
# A step holds no more tokens, so that prompts are cut in parts beside others' decodes.
CHUNK = 96
HITS = "vllm:prefix_cache_hits_total"


def text(step: int, count: int) -> str:
    """Return so many words, in an order that does not repeat soon."""
    return " ".join(WORDS[(i * i + step * i) % len(WORDS)] for i in range(count))


# Two and then three share what fills a block of the cache (128 tokens) or two. Longer than the
# window are all but the first three.
SHARED = text(5, 160)
PROMPTS = (
    "water",
    "The people know how to make",
    "one two three four five six seven",
    SHARED,
    f"{SHARED} {text(11, 40)}",
    text(3, 300),
    f"{text(3, 300)} {text(2, 9)}",
    f"{text(3, 300)} so",
)
# The first of them that a window, or what a prefix holds, can change.
FAULTY = 3


@dataclass(frozen=True)
class Attention(Setup):
    """One way to serve a tiny model; on the emulated device with what it may do to prompts."""

    prefix_caching: bool = True
    chunked_prefill: bool = True
    pooling: bool = False
    causal: bool = True

    def name(self) -> str:
        """Return a short name for reports."""
        words = [super().name()]
        words += ["embeds"] * self.pooling + ["encodes"] * (not self.causal)
        words += ["cached"] * self.prefix_caching + ["chunked"] * self.chunked_prefill
        return " ".join(words)

    @property
    def fault(self) -> str:
        """The fault of `attention_plugin` that must show here; empty if there is none."""
        if self.pooling:
            return "pooling" * self.causal
        return "window" * self.model.endswith("window")

    @property
    def prompts(self) -> tuple[str, ...]:
        return PROMPTS

    def arguments(self) -> list[str]:
        """vLLM's command line."""
        words = ["--dtype", self.dtype, "--max-model-len", str(MAX_TOKENS)]
        words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        words += ["--max-num-seqs", "16", "--max-num-batched-tokens"]
        words += [str(CHUNK if self.chunked_prefill else 4 * MAX_TOKENS)]
        for option, on in (
            ("prefix-caching", self.prefix_caching),
            ("chunked-prefill", self.chunked_prefill),
        ):
            words.append(f"--{'' if on else 'no-'}enable-{option}")
        if not self.compiled:
            words.append("--enforce-eager")
        if self.raw_logits:
            words += ["--logprobs-mode", "raw_logits"]
        if self.pooling:
            words += ["--runner", "pooling", "--convert", "embed"]
            # Unit vectors would hide half of what is wrong with them.
            pooler = {"pooling_type": "LAST", "use_activation": False}
            words += ["--pooler-config", json.dumps(pooler)]
        if not self.causal:
            words += ["--hf-overrides", json.dumps({"is_causal": False})]
        return words


@dataclass
class Seen:
    """What a server on the emulated device said.

    Attributes:
        first: Answers to the prompts, following those of the server without the shim; or vectors.
        again: Their beginning once more, when the cache holds what it can of the prompts.
        together: Answers to the prompts, each in a request of its own, at once.
        hits: Tokens that came out of the prefix cache.
        faulty: With the set-up's fault switched on.
        states: State and row of each kind of batch that was routed.
        status: `ascend-patch status --json` of its run, while it was alive.
        log: What the emulated device said in the server's log.
    """

    first: Any
    again: Any = ()
    together: Any = ()
    hits: float = 0.0
    faulty: Any = ()
    states: set[str] = field(default_factory=set)
    status: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    started_in: float = 0.0


class AttentionLab:
    """Runs servers one after the other; what each said is kept, so each set-up starts once."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.kept: dict[tuple[Attention, bool], Seen] = {}

    def plain(self, setup: Attention) -> Seen:
        """Return what vLLM's own attention says: one rank, whole prompts, no prefix cache."""
        setup = replace(setup, prefix_caching=False, chunked_prefill=False, tensor_parallel=1)
        key = (setup, False)
        if key not in self.kept:
            with self.lab.server(setup, patches=None) as server:
                self.kept[key] = Seen(
                    embed(server) if setup.pooling else logprobs.ask(server, prompts=PROMPTS),
                    started_in=server.started_in,
                )
        return self.kept[key]

    def emulated(self, setup: Attention) -> Seen:
        """Return what a server on the emulated device says to the same."""
        key = (setup, True)
        if key not in self.kept:
            lead = None if setup.pooling else self.plain(setup).first
            folder = self.lab.folder / f"attention-{self.lab.started}"
            folder.mkdir()
            with self.server(setup, folder) as server:
                seen = self.kept[key] = Seen(ask(server, lead), started_in=server.started_in)
                seen.again = ask(server, lead and logprobs.heads(lead))
                seen.together = at_once(server, lead)
                seen.hits = server.metric(HITS)
                seen.status = self.lab.status(server)
                lines = server.log.read_text().splitlines()
                seen.log = [line for line in lines if "emulated device: " in line]
                seen.states = {path.name for path in (folder / "seen").iterdir()}
                if setup.fault:
                    (folder / "fault").write_text(setup.fault)
                    seen.faulty = ask(server, lead and logprobs.heads(lead[FAULTY:]))
        return self.kept[key]

    def server(self, setup: Attention, folder: Path) -> Server:
        paths = [path for path in (self.lab.python.drop_in, str(PLUGIN)) if path]
        return self.lab.server(
            setup,
            patches="attention_router",
            ASCEND_PATCHES_DEVICE="emulated",
            ASCEND_PATCHES_STRICT="1",
            E2E_ATTENTION_FOLDER=str(folder),
            PYTHONPATH=":".join(paths),
        )


def ask(server: Server, lead: tuple[logprobs.Answer, ...] | None) -> Any:
    """Return answers that follow `lead`, or the prompts' vectors where there is none."""
    return embed(server) if lead is None else logprobs.ask(server, lead)


def at_once(server: Server, lead: tuple[logprobs.Answer, ...] | None) -> Any:
    """The same, each prompt in a request of its own, all at the same time."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        if lead is None:
            return [row for rows in pool.map(lambda p: embed(server, p), PROMPTS) for row in rows]
        found = pool.map(lambda answer: logprobs.ask_together(server, (answer,)), lead)
        return tuple(answer for answers in found for answer in answers)


def embed(server: Server, *prompts: str) -> list[list[float]]:
    """Return a vector for each of the prompts, or of PROMPTS, one request after the other."""
    rows = []
    for prompt in prompts or PROMPTS:
        found = server.post("/v1/embeddings", {"model": "model", "input": prompt})
        rows += [item["embedding"] for item in found["data"]]
    return rows


def right_vectors(model: Path) -> list[list[float]]:
    """The same by transformers, in float32 and with no cache: the last token's hidden state."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModel.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids
            rows.append(network(input_ids=tokens).last_hidden_state[0, -1].tolist())
    return rows


def apart(first: list[list[float]], second: list[list[float]]) -> list[float]:
    """The largest difference of each pair of vectors."""
    return [
        max(abs(x - y) for x, y in zip(one, other, strict=True))
        for one, other in zip(first, second, strict=True)
    ]
