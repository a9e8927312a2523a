"""Somebody else wraps, or replaces, what a patch changes: real vLLM, wrapt and OpenTelemetry."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from house import ROOT, room, start
from peer_codes import NEIGHBOUR, ROTARY

FORWARD = "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_native"
EXACT = 1e-4  # float32, a sum of two products of normal numbers and a cosine of position * 1

SAY = (
    ROTARY
    + """
def spans():
    found = [span.name for span in sys.neighbour.spans.get_finished_spans()]
    sys.neighbour.spans.clear()
    return found

graphs = []
def keep(graph, _):
    graphs.append(graph.code)
    return graph

def look():
    'One eager call and one compiled: the error of each, the spans, our calls, and the graph.'
    calls = target()["calls"]
    eager = error(layer.forward_native)
    seen, calls = spans(), target()["calls"] - calls
    torch._dynamo.reset()
    # As vLLM compiles a model.
    compiled = torch.compile(
        lambda *args: layer.forward_native(*args), backend=keep, fullgraph=True,
        options={"guard_filter_fn": lambda guards: [False for _ in guards]},
    )
    return {"eager": eager, "spans": seen, "calls": calls, "compiled": error(compiled),
            "graph": graphs[-1], "state": target()["state"], "reason": target()["reason"]}

runtime = ascend_patch._runtime.current()
said = {"both": look()}
ascend_patch.revert("rotary")
said["reverted"] = look()
runtime.apply("rotary")
said["again"] = look()
# As instrumentations take themselves back.
base.RotaryEmbedding.forward_native = vars(base.RotaryEmbedding)["forward_native"].__wrapped__
said["ours alone"] = look()
ascend_patch.revert("rotary")
said["neither"] = look()
said["type"] = type(vars(base.RotaryEmbedding)["forward_native"]).__name__
said["problems"] = ascend_patch.status()["problems"]
print("\\n" + json.dumps(said))
"""
)


@pytest.fixture(autouse=True)
def _needed():
    for name in ("vllm", "opentelemetry.sdk"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"missing: {name} (scripts/test makes an environment that has it)")


def run(code, *path, status, **environ):
    return start(
        [sys.executable, "-c", code],
        path=path,
        timeout=280,
        ASCEND_PATCHES="all",
        ASCEND_PATCHES_DEVICE="cpu",
        ASCEND_PATCHES_STATUS_DIR=str(status),
        VLLM_CPU_KVCACHE_SPACE="1",
        **environ,
    )


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_an_instrumentation_on_a_compiled_layer_in_both_orders(first, tmp_path, seed):
    """Their finder is in front of ours or behind it, so theirs lies on the layer before or after.

    Both run, whoever comes first; each is taken back without the other.
    """
    theirs = room(tmp_path / "neighbour", NEIGHBOUR.format(chains=first == "theirs"))
    path = (theirs, ROOT) if first == "theirs" else (ROOT, theirs)
    done = run(f"SEED = {seed}\n{SAY}", *path, status=tmp_path / "status")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print({k: {**v, "graph": len(v["graph"])} for k, v in said.items() if isinstance(v, dict)})
    looks = ("both", "reverted", "again", "ours alone", "neither")
    assert all(said[name][how] < EXACT for name in looks for how in ("eager", "compiled")), said
    span = ["RotaryEmbedding.forward_native"]
    assert [said[name]["spans"] for name in looks] == [span, span, span, [], []]
    assert [said[name]["calls"] for name in looks] == [1, 0, 1, 1, 0]
    states = ["applied", "reverted", "applied", "applied", "reverted"]
    assert [said[name]["state"] for name in looks] == states
    # What is compiled is ours where ours is applied, whatever lies on it.
    ours, theirs = said["ours alone"]["graph"], said["neither"]["graph"]
    assert ours != theirs
    assert [said[name]["graph"] for name in ("both", "reverted", "again")] == [ours, theirs, ours]
    wrapper = "a wrapt wrapper of sitecustomize"
    before, after = f"{wrapper} had wrapped it before", f"wrapped by {wrapper}"
    assert said["both"]["reason"] == (before if first == "theirs" else after)
    assert (said["type"], said["problems"]) == ("function", [])


# A distribution with a plugin, as `pip install` leaves it: it replaces what a patch has changed,
# and wraps something else.
PLUGIN = """
import wrapt
from vllm.model_executor.layers.rotary_embedding import base

def forward_native(self, positions, query, key=None, offsets=None):
    return query, key

def register():
    base.RotaryEmbedding.forward_native = forward_native
    wrapt.wrap_function_wrapper(base, "RotaryEmbedding.forward_cpu", watched)

def watched(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)
"""


@pytest.fixture
def plugin(tmp_path):
    """A folder for PYTHONPATH with the distribution acme-rope 1.2 in it."""
    folder = tmp_path / "site"
    info = folder / "acme_rope-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / "acme_rope.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rope\nVersion: 1.2\n")
    (info / "RECORD").write_text("acme_rope.py,,\nacme_rope-1.2.dist-info/METADATA,,\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nacme = acme_rope:register\n")
    return folder


def test_doctor_names_who_replaced_a_target(plugin, tmp_path):
    doctor = "import sys; from ascend_patch.cli import main; sys.exit(main(['doctor', '--json']))"
    done = run(doctor, ROOT, plugin, status=tmp_path / "status")
    assert done.returncode == 1, done.stderr[-3000:]
    found = json.loads(done.stdout)["findings"]
    said = {finding["text"]: finding["level"] for finding in found if finding["about"] == "rotary"}
    hidden = (
        f"{FORWARD}: replaced by forward_native of acme_rope (acme-rope 1.2) after we had applied; "
        "that is in force and ours does not run: leave one of the two out"
    )
    wrapped = (
        f"{FORWARD.replace('native', 'cpu')}: wrapped by a wrapt wrapper of acme_rope "
        "(acme-rope 1.2)"
    )
    assert (said.get(hidden), said.get(wrapped)) == ("wrong", "note"), said
    (named,) = (finding["text"] for finding in found if finding["about"] == "plugin")
    assert named.startswith("acme-rope 1.2 (vllm.general_plugins: acme)")
    # What else is wrong here is nothing of the plugin's.
    others = [f for f in found if f["level"] == "wrong" and f["text"] != hidden]
    assert not [f for f in others if "acme" in f["text"]], others
