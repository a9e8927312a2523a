"""Servers whose Triton kernels run on the software NPU: 0.18.0 by the switch, 0.23.0 always."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from _system import SetupError
from logprobs import LONG_PROMPTS, PROMPTS
from softnpu_environment import Environment
from softnpu_servers import Reference, ask, calls, server, started, tiny_model


@dataclass(frozen=True)
class Case:
    """What is served, and what has to have run.

    Attributes:
        kind: Of the tiny model.
        texts: What it is asked.
        kernels: Triton kernels of the release that run without the shim.
        patches: Those that run with it.
    """

    release: str
    kind: str
    texts: tuple[str, ...]
    kernels: tuple[str, ...]
    patches: tuple[str, ...]
    arguments: tuple[str, ...] = ()


# The last is longer than ten blocks of the cache, and hits the prefix cache the second time.
DENSE = (*PROMPTS[:4], PROMPTS[8], LONG_PROMPTS[1], LONG_PROMPTS[1])
# Of one chunk of GDN's kernels, and of several; interpreted, a chunk takes seconds.
HYBRID = (*PROMPTS[:3], PROMPTS[8], PROMPTS[11])
CASES = {
    "0.18.0": Case("0.18.0", "qwen3", DENSE, ("_triton_rope",), ("attention_router", "rotary")),
    "0.23.0": Case(
        "0.23.0",
        "qwen3",
        DENSE,
        ("_compute_slot_mapping_kernel",),
        ("attention_router", "rotary"),
    ),
    # K is not V, so that a transposed state shows.
    "0.18.0 Qwen3-Next": Case(
        "0.18.0",
        "qwen3-next",
        HYBRID,
        (
            "_triton_rope",
            "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
            "chunk_fwd_kernel_o",
            "fused_gdn_gating_kernel",
        ),
        ("attention_router", "gdn_attn", "rotary"),
        ("--no-enable-prefix-caching",),
    ),
}

pytestmark = pytest.mark.slow


def launches(folder) -> dict[str, int]:
    """Return how often each Triton kernel was launched in the processes of a server."""
    found: dict[str, int] = {}
    for file in folder.glob("operators-*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            count, _, name = line.partition(" ")
            if name.startswith("triton::"):
                kernel = name.removeprefix("triton::")
                found[kernel] = found.get(kernel, 0) + int(count)
    return found


@pytest.mark.parametrize("name", CASES)
def test_servers_with_triton_say_what_transformers_says(name, tmp_path):
    """As near to float32 as transformers in bfloat16 is, which rounds at as many places."""
    case = CASES[name]
    try:
        npu = Environment(case.release).prepare()
    except SetupError as error:
        pytest.skip(f"missing: {error}")
    model = tiny_model(npu, case.kind)
    servers = {}
    for form, patches in (("unpatched", ""), ("patched", "all")):
        folder = tmp_path / form
        (folder / "trace").mkdir(parents=True)
        variables = {"SOFTNPU_TRITON": "1", "SOFTNPU_TRACE": str(folder / "trace")}
        servers[form] = server(
            npu, model, folder, *case.arguments, patches=patches, seconds=480, **variables
        )
    with started(servers):
        said = {form: ask(one, case.texts) for form, one in servers.items()}
    exact, rounded = Reference(model, "float32"), Reference(model, "bfloat16")
    for form, answers in said.items():
        found, noise = exact.distance(answers), exact.distance_of(rounded, answers)
        print(f"{name} {form}: {found} from float32; transformers in bfloat16: {noise}")
        print(launches(tmp_path / form / "trace"))
        assert found.root_mean_square <= 1.25 * noise.root_mean_square
        assert found.worst <= 2 * noise.worst
    assert launches(tmp_path / "unpatched/trace").keys() >= set(case.kernels)
    counts = calls(npu, tmp_path / "patched")
    assert all(counts[patch] > 0 for patch in case.patches), counts
