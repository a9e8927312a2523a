"""scripts/serve says how a server was started and why it failed; on a vLLM that is a small fake.

What real vLLM releases do is in `tests/e2e/test_serve_e2e.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _env  # noqa: E402
import _serve  # noqa: E402
import _server  # noqa: E402

SECONDS = 60
# As vLLM's CPU worker: it refuses to start without the libraries that LD_PRELOAD names.
FAKE = r"""
import http.server, json, os, sys, time

def fail(process, error, sentence):
    print(f"({process} pid=7) ERROR 12-01 10:00:00 [core.py:1099] {sentence}")
    for line in ("Traceback (most recent call last):", "  File \"x.py\", line 1, in f", error):
        print(f"({process} pid=7) ERROR 12-01 10:00:00 [core.py:1099] {line}")
    for line in ("Traceback (most recent call last):", "  File \"y.py\", line 1, in g",
                 "RuntimeError: Engine core initialization failed. See root cause above."):
        print(f"(APIServer pid=6) {line}", flush=True)

if "preload" not in os.environ.get("LD_PRELOAD", ""):
    sys.exit("no preloaded library")
assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
assert os.environ["ASCEND_PATCHES"] == "all, -kv_connector"
MODE = os.environ["FAKE_MODE"]
REFUSAL = "NotImplementedError: head size 20 is not supported on CPU"
if MODE.startswith("refused"):
    fail("EngineCore_0", REFUSAL, "EngineCore failed to start.")
    if MODE == "refused":
        sys.exit(1)
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if MODE == "refused":
            pass
        if MODE.startswith("dies"):
            fail("EngineCore_DP0", REFUSAL, "EngineCore encountered a fatal error.")
        if MODE == "dies and hangs":
            time.sleep(600)
        if MODE == "dies and answers":
            self.answer(500, {"error": "EngineCore encountered an issue. See stack trace (above)"})
        self.answer(200, {"choices": [{"text": "fine"}]})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Run `scripts/serve` on the fake, in the mode that is named."""
    package = tmp_path / "a folder" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").write_text("")
    (package / "api_server.py").write_text(FAKE)
    for name in [name for name in os.environ if name.startswith(("VLLM", "ASCEND"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(package.parents[2]))
    monkeypatch.setenv("ASCEND_PATCHES", "all, -kv_connector")
    monkeypatch.setenv("ASCEND_PATCHES_RUN", "of-another-server")
    monkeypatch.setenv("ASCEND_PATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_server, "FATAL_SECONDS", 1, raising=False)
    monkeypatch.setattr(_serve, "tiny_model", lambda env, kind: tmp_path / "a model")
    monkeypatch.setattr(_serve, "print_status", lambda env, variables: None)
    python = Path(sys.executable)
    environment = _env.Environment(python, python, "cpu", preload=str(tmp_path / "preload.so"))
    monkeypatch.setattr(_env, "prepare", lambda **_: environment)

    def run(mode, *words):
        monkeypatch.setenv("FAKE_MODE", mode)
        _serve.serve(_serve.parse(list(words)))

    return run


@pytest.mark.fault("serve_prints_a_broken_command")
def test_the_command_that_is_printed_runs_as_it_is(serve, capfd, monkeypatch, tmp_path):
    serve("fine", "--port", str(_server.free_port()), "--", "--seed", "1", "--x", "two words")
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "api_server" in line]
    command = line.removeprefix("[ascend-patch] ")
    (port,) = re.findall(r"--port (\d+)", command)
    # A user's shell: with the variables of this process, in any folder.
    process = subprocess.Popen(
        ["sh", "-c", f"{command} & echo $! >{tmp_path}/pid; wait"],
        cwd="/",
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, f"the command that is printed ends: {command}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < deadline, "the command that is printed does not serve"
                time.sleep(0.1)
        words = _running(int(port))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert words[-4:] == ["--seed", "1", "--x", "two words"]
    assert str(tmp_path / "a model") in words


def _running(port: int) -> list[str]:
    """The command line of the process that serves at this port."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")[:-1]
        except OSError:
            continue
        if "vllm.entrypoints.openai.api_server" in words and str(port) in words:
            return words
    raise AssertionError("no process has that command line")


@pytest.mark.fault("serve_hides_the_cause")
@pytest.mark.parametrize(
    "mode", ["refused", "refused and hangs", "dies and hangs", "dies and answers"]
)
def test_a_server_that_fails_is_given_up_soon_with_the_cause(mode, serve, capfd, tmp_path):
    began = time.monotonic()
    # The server itself would have a quarter of an hour.
    with pytest.raises(_server.ServerError) as caught:
        serve(mode, "--deadline", "30")
    elapsed = time.monotonic() - began
    said = str(caught.value)
    assert "NotImplementedError: head size 20 is not supported on CPU" in said
    (log,) = (tmp_path / "cache" / "logs").glob("serve-*.log")
    assert str(log) in said
    assert elapsed < 25, "it waits for what cannot come"


def test_a_server_that_works_has_no_cause(serve, capfd):
    """The control: nothing is given up."""
    serve("fine", "--deadline", "30")
    assert "answer: fine" in capfd.readouterr().out


LINE = "(EngineCore pid=1) ERROR 12-01 16:06:46 [core.py:1099] {}"
LOGS = {
    "nothing": ("", ""),
    "no exception": ("INFO 12-01 16:06:46 [x.py:1] all is well\n", ""),
    "a usage error": (
        "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --x\n",
        "api_server.py: error: unrecognized arguments: --x",
    ),
    "without names": (
        "Traceback (most recent call last):\n  File\nValueError: a: b\n",
        "ValueError: a: b",
    ),
    "a validation error": (
        "(APIServer pid=1) Traceback (most recent call last):\n(APIServer pid=1)   File\n"
        "(APIServer pid=1) pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "(APIServer pid=1)   Value error, the architecture X is not supported\n",
        "pydantic_core.ValidationError: 1 validation error for ModelConfig | Value error, the "
        "architecture X is not supported",
    ),
    "in turns": (
        "(Worker_TP0 pid=1) Traceback (most recent call last):\n"
        "(APIServer pid=2) Traceback (most recent call last):\n"
        "(Worker_TP0 pid=1)   File\n(APIServer pid=2)   File\n"
        "(Worker_TP0 pid=1) RuntimeError: the cause\n"
        "(APIServer pid=2) vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an "
        "issue. See stack trace (above) for the root cause.\n",
        "RuntimeError: the cause",
    ),
    "only pointers": (
        "Traceback (most recent call last):\n\nRuntimeError: Engine core initialization failed\n",
        "RuntimeError: Engine core initialization failed",
    ),
    "without a colon": (
        f"{LINE.format('Traceback (most recent call last):')}\n{LINE.format('  x')}\n"
        f"{LINE.format('AssertionError')}\n",
        "AssertionError",
    ),
    "one that was caught before": (
        "Traceback (most recent call last):\n  x\nImportError: no triton\n"
        "Traceback (most recent call last):\n  x\nValueError: the last\n",
        "ValueError: the last",
    ),
    "the words of an answer": ("ValueError: said a prompt\n", ""),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_cause_is_read_from_the_log(name):
    import _server_log

    text, cause = LOGS[name]
    assert _server_log.cause(text) == cause
