"""What an applied patch leaves to the host in a running server: in its state, with a count."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch import _runtime  # noqa: E402
from ascend_patch._state import PatchState, ProcessState  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
ATTENTION = "vllm_ascend.attention.attention_v1"
PATCHES = ("attention_router", "rotary", "gdn_attn")


@pytest.fixture
def state(monkeypatch, tmp_path):
    """The state of a process in which three patches are applied, with files of its own."""
    monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", str(tmp_path / "status"))
    monkeypatch.setenv("ASCEND_PATCHES_RUN", "")
    made = ProcessState()
    for name in PATCHES:
        made.patches[name] = PatchState(name, "1", "applied", "because")
    monkeypatch.setattr(_runtime.current(), "state", made)
    made.open_files()
    made.write()
    try:
        from ascend_patch.impl import left_to_host
    except ImportError:  # an older tree
        return made
    monkeypatch.setattr(left_to_host, "_counters", {})
    return made


def left(state: ProcessState) -> dict[str, int]:
    found: dict[str, int] = state.snapshot().get("left_to_host", {})
    return found


@pytest.fixture
def attention(monkeypatch):
    """A step of vllm-ascend's attention, as far as the patch looks at it, on the system A2."""
    from ascend_patch.impl import attention_ascend, attention_ascend_steps

    module = types.ModuleType(ATTENTION)
    for name in ("AscendAttentionBackendImpl", "AscendMetadata", "AscendAttentionBackendImpl310"):
        setattr(module, name, type(name, (SimpleNamespace,), {"__module__": ATTENTION}))
    module._EXTRA_CTX = SimpleNamespace(capturing=False)
    monkeypatch.setitem(sys.modules, ATTENTION, module)
    monkeypatch.setattr(attention_ascend_steps, "system", lambda device: "A2")

    def step(dtype=torch.float32, cls="AscendAttentionBackendImpl", scale=1.0, window=4):
        tokens, heads, size = 8, 2, 128
        impl = getattr(module, cls)(
            head_size=size, num_heads=heads, num_kv_heads=heads, sliding_window=window, sinks=None,
            scale=1.0, attn_type="decoder", key_cache=torch.zeros(2, 128, heads, size, dtype=dtype),
            value_cache=torch.zeros(2, 128, heads, size, dtype=dtype),
        )  # fmt: skip
        metadata = module.AscendMetadata(
            attn_state=SimpleNamespace(name="PrefillNoCache"), actual_seq_lengths_q=[tokens],
            seq_lens_list=[tokens], causal=True, model_runner_type="generate",
            num_actual_tokens=tokens, max_query_len=tokens, block_tables=torch.zeros(1, 1).int(),
        )  # fmt: skip
        x = torch.zeros(tokens, heads, size, dtype=dtype)
        layer = SimpleNamespace(_k_scale_float=scale, _v_scale_float=1.0)
        args = (layer, x, x, x, torch.zeros(2, 1), metadata, torch.zeros_like(x))
        return attention_ascend.forward_0_18(lambda *a, **k: "the host's", impl, args, {})

    return step


@pytest.mark.fault("left_to_the_host_in_silence")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "window ignored, and left so. .*float32"),
        ({"dtype": torch.bfloat16, "scale": 0.5}, "window ignored, and left so: keys or values"),
        ({"cls": "AscendAttentionBackendImpl310"}, "window ignored by AscendAttentionBackendImpl3"),
    ],
    ids=["float32 on A2", "scaled keys", "a class that inherits"],
)
def test_steps_that_the_router_leaves_are_in_its_state(state, attention, how, says):
    for _ in range(6):
        assert attention(**how) == "the host's"
    found = left(state)
    assert list(found.values()) == [6], found
    (reason,) = found
    assert re.match(f"attention_router: {says}", reason), reason


def test_a_step_that_is_right_in_the_release_is_not_counted(state, attention):
    """The control: no window, so there is nothing that the release gets wrong."""
    assert attention(window=None) == "the host's"
    assert left(state) == {}


@pytest.mark.fault("left_to_the_host_in_silence")
def test_calls_that_rotary_leaves_are_in_its_state(state):
    from ascend_patch.impl import rotary, rotary_angles

    layer = SimpleNamespace(head_size=4, enable_fp32_compute=False)
    original = lambda self, *args: "the host's"  # noqa: E731
    for _ in range(3):
        forward = rotary.forward(original)
        query = torch.zeros(2, 8, dtype=torch.float64)
        assert forward(layer, torch.arange(2), query) == "the host's"
    angles = torch.zeros(2, 2)
    apply = rotary_angles.forward(original)
    assert apply(layer, torch.zeros(2, 2, 4, dtype=torch.float64), angles, angles) == "the host's"
    # The control: where the layer asks for float32 the host is right.
    layer.enable_fp32_compute = True
    assert apply(layer, torch.zeros(2, 2, 4), angles, angles) == "the host's"
    found = left(state)
    assert sorted(found.values()) == [1, 3], found
    assert all(reason.startswith("rotary: ") for reason in found)


@pytest.mark.fault("left_to_the_host_in_silence")
def test_status_and_json_show_what_is_left_while_the_process_runs(state, attention):
    for _ in range(6):
        attention()
    command = [sys.executable, "-m", "ascend_patch", "status"]

    def output(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    assert "left to the host 6 times by attention_router: window ignored" in output()
    attention()
    (run,) = json.loads(output("--json"))["runs"]
    (process,) = run["processes"]
    assert list(process["left_to_host"].values()) == [7]


def test_compiled_code_notes_it_once_and_its_graph_has_nothing_of_it(state):
    from ascend_patch.impl import left_to_host

    graphs = []

    def backend(graph, inputs):
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    def forward(x):
        left_to_host.count_traced("rotary", "a rank that the kernel does not take")
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    for _ in range(3):
        compiled(torch.zeros(3))
    assert graphs == [["placeholder", "call_function", "output"]]
    assert left(state) == {
        "rotary: a rank that the kernel does not take "
        "(in compiled code, whose calls are not counted)": 1
    }
    forward(torch.zeros(3))
    assert left(state)["rotary: a rank that the kernel does not take"] == 1


def test_reasons_are_bounded_and_counting_is_cheap(state):
    from ascend_patch.impl import left_to_host

    for number in range(500):
        left_to_host.count("rotary", f"reason {number}")
    found = left(state)
    assert len(found) == left_to_host.MOST_REASONS + 1
    assert sum(found.values()) == 500
    calls, started = 100_000, time.process_time()
    for _ in range(calls):
        left_to_host.count("rotary", "reason 1")
    assert left(state)["rotary: reason 1"] == calls + 1
    # Some 0.3 us each; the bound is that of a look at a file, which it must not be.
    assert (time.process_time() - started) / calls < 5e-6
