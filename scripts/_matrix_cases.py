"""What scripts/matrix asks of which release, and what one answer looks like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from _pair import FINE

RELEASES = ("0.11.0", "0.17.0", "0.18.0", "0.23.0", "0.32.0")
# The modules that the patches change are imported as on each of these.
DEVICES = ("cpu", "cuda", "emulated")
# Of a logprob in float32; what two right implementations differ by is less.
FLOAT32_LIMIT = 1e-4
# Another implementation than vLLM's, which computes the whole text at once.
TRANSFORMERS_LIMIT = 1e-3
# Of logits in bfloat16, in units in the last place of the largest; for a hybrid model what
# its unpatched server differs from itself by when prompts share a batch.
BFLOAT16_ULPS = 2
# How much more than the limit a spoilt kernel must show, for the comparison to mean anything.
POWER = 10

# What may become of a patch here; which of them it is, the table shows.
DECIDED = (*FINE, "skipped")

ITSELF = "its unpatched run"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Case:
    """One model, served by one release with the shim and without.

    Attributes:
        model: How the table calls it.
        kind: Of `_tiny_weights`.
        dtype: Of its weights.
        arguments: What this release wants besides, to serve it.
        fault: What spoils one of our kernels: a plugin of tests/e2e, and the fault's name.
        served: Whether the release serves it on a CPU, patched; False where it has no kernels.
        alone: Whether it does without the shim.
        note: What the table says of it, as a sentence without its full stop.
    """

    release: str
    model: str
    kind: str
    dtype: str = "float32"
    arguments: tuple[str, ...] = ()
    fault: tuple[str, str] = ("fault_plugin", "sine")
    served: bool = True
    alone: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.release} {self.model}"

    def command_line(self) -> tuple[str, ...]:
        """vLLM's arguments. No prefix cache: what one fault has put there outlives it."""
        words = ["--dtype", self.dtype, "--max-model-len", "2048", "--enforce-eager"]
        words.append("--no-enable-prefix-caching")
        if self.dtype != "float32":
            # Logprobs subtract a sum; what is compared in units in the last place are logits.
            words += ["--logprobs-mode", "raw_logits"]
        return (*words, *self.arguments)


# The sizes that each release's own CPU kernels take.
NEXT = ("Qwen3-Next", "qwen3-next-square")
GDN_FAULT = ("gdn_plugin", "beta")


# Eager servers of 0.11 to 0.13 take vLLM's own operator on a CPU (CustomOp.forward_cpu calls
# forward_cuda); compiled ones take forward_native, as these arguments have an eager one do.
NATIVE = ("--compilation-config", '{"custom_ops": ["none"]}')
NATIVE_NOTE = (
    "served with vLLM's own operators off, as compiled servers are; an eager one of this release "
    "keeps its own rotary operator on a CPU, and `rotary` is applied and not reached"
)

CASES = (
    Case("0.11.0", "Qwen3", "qwen3", arguments=NATIVE, note=NATIVE_NOTE),
    *(Case(release, "Qwen3", "qwen3") for release in RELEASES[1:]),
    Case("0.11.0", *NEXT, served=False, alone=False),
    Case("0.17.0", *NEXT, served=False, alone=False),
    Case("0.18.0", *NEXT, fault=GDN_FAULT, alone=False),
    Case("0.23.0", *NEXT, dtype="bfloat16", arguments=("--mamba-ssm-cache-dtype", "float32")),
    Case("0.32.0", *NEXT, dtype="bfloat16"),
)


@dataclass
class Seen:
    """What one patch did in a server, or when its modules were imported."""

    state: str
    reason: str = ""
    calls: int = 0


@dataclass
class Result:
    """One row: a model that a release serves, or its modules imported for a device.

    Attributes:
        what: The model, or "imports, DEVICE".
        date: Of the run, UTC.
        commit: Of the checkout, with a + where it was changed.
        versions: Of vllm, torch, transformers and python.
        verdict: "same", "not served", of imports "applied" or "applied in part" (vLLM itself cannot
            import the rest here), or what is wrong, as a sentence.
        oracle: What the patched answers were compared with.
        steps: How many steps were compared.
        other_tokens: At how many of them the greedy choice was another.
        worst: The largest difference of a token's logprob (of its logit, not in float32).
        limit: What it may be.
        spoilt: The least difference that any prompt shows when our kernel's output is spoilt.
        patches: What became of each.
        why: Why something is not served or imported, in vLLM's own words.
        note: Of the case.
        seconds: The whole row took so long.
    """

    release: str
    what: str
    dtype: str
    date: str
    commit: str
    versions: dict[str, str]
    verdict: str = ""
    oracle: str = ""
    steps: int = 0
    other_tokens: int = 0
    worst: float | None = None
    limit: float | None = None
    spoilt: float | None = None
    patches: dict[str, Seen] = field(default_factory=dict)
    why: str = ""
    note: str = ""
    seconds: int = 0

    @property
    def fine(self) -> bool:
        return self.verdict in ("same", "applied", "applied in part", "not served")


def result_of(data: dict[str, Any]) -> Result:
    """Return a kept result."""
    patches = {name: Seen(**seen) for name, seen in data["patches"].items()}
    return Result(**{**data, "patches": patches})
