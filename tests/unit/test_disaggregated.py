"""scripts/serve_disaggregated without vLLM's servers."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _disaggregated  # noqa: E402
import _disaggregated_serve as serve  # noqa: E402
from _disaggregated import Sizes  # noqa: E402
from _disaggregated_proxy import Proxy  # noqa: E402
from _server import HOST, Server, ServerError, free_port  # noqa: E402
from _system import SetupError  # noqa: E402


@contextmanager
def answering(answer: Any) -> Iterator[int]:
    """A small HTTP server: `answer(path, body)` is (status, JSON); yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = answer(self.path, json.loads(body or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *words: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def a_server(port: int, folder: Path) -> Server:
    server = Server(Path(sys.executable), "none", env={}, log=folder / "log")
    server.port = port
    return server


def a_pair(folder: Path, prefill: int, decode: int, bootstrap: int) -> _disaggregated.Pair:
    servers = (a_server(port, folder) for port in (prefill, decode))
    return _disaggregated.Pair(*servers, bootstrap)


def test_a_proxy_asks_prefill_for_the_kv_and_decode_for_the_answer(tmp_path) -> None:
    heard = []

    def prefilling(path: str, body: Any) -> tuple[int, Any]:
        if path == "/query":
            return 200, {"0": {"engine_id": "the-engine"}}
        heard.append(("prefill", body))
        return 200, {}

    def decoding(path: str, body: Any) -> tuple[int, Any]:
        heard.append(("decode", body))
        return 200, {"said": "this"}

    with answering(prefilling) as first, answering(decoding) as second:
        lines: list[str] = []
        pair = a_pair(tmp_path, first, second, first)
        with Proxy(pair, 0, lines.append) as proxy:
            found = serve.complete(proxy, "a prompt", max_tokens=7)
    assert found == {"said": "this"}
    (who, asked), (then, last) = heard
    assert (who, then) == ("prefill", "decode")
    assert (asked["max_tokens"], last["max_tokens"]) == (1, 7)
    sends, takes = asked["kv_transfer_params"], last["kv_transfer_params"]
    assert sends["do_remote_decode"]
    assert takes["do_remote_prefill"]
    assert sends["transfer_id"] == takes["transfer_id"]
    assert takes["remote_engine_id"] == "the-engine"
    assert len(lines) == len(proxy.first_tokens) == 1


def test_a_request_whose_prefill_fails_never_reaches_decode(tmp_path) -> None:
    asked = []

    def decoding(path: str, body: Any) -> tuple[int, Any]:
        asked.append(path)
        return 200, {}

    with (
        answering(lambda path, body: (500, "no")) as first,
        answering(decoding) as second,
        Proxy(a_pair(tmp_path, first, second, first), 0, print) as proxy,
        pytest.raises(ServerError, match=r"answers 502: .*prefill: .*with 500"),
    ):
        serve.complete(proxy, "a prompt", max_tokens=7)
    assert asked == []


def test_a_port_that_is_taken_is_said_before_any_server_starts(tmp_path) -> None:
    pair = a_pair(tmp_path, 1, 2, 3)
    with (
        answering(lambda path, body: (200, {})) as port,
        pytest.raises(ServerError, match=f"cannot listen at {HOST}:{port} .*--port"),
    ):
        Proxy(pair, port)
    with pytest.raises(ServerError, match="70000"):
        Proxy(pair, 70000)
    with Proxy(pair, free_port()) as proxy:
        connection = http.client.HTTPConnection(HOST, proxy.port, timeout=5)
        connection.request("GET", "/health")
        # It listens; the decode server that it asks is none.
        assert connection.getresponse().status == 502


@pytest.mark.parametrize("words", [["--prefill-tp", "0"], ["--decode-tp=-1"], ["--decode-tp=two"]])
def test_what_is_no_tensor_parallel_size_is_refused(words, capsys) -> None:
    with pytest.raises(SystemExit):
        serve.parse(words)
    assert "is no tensor-parallel size" in capsys.readouterr().err


def running(folder: Path, name: str) -> Server:
    """A server whose process only sleeps, in a session of its own."""

    class Sleeping(Server):
        def command(self) -> list[str]:
            return [sys.executable, "-I", "-c", "import time; time.sleep(600)"]

    server = Sleeping(Path(sys.executable), "none", env={}, log=folder / name)
    server.start()
    return server


@pytest.mark.parametrize("dead", ["prefill", "decode"])
def test_a_server_that_dies_ends_the_service_and_the_other_server(tmp_path, dead) -> None:
    pair = _disaggregated.Pair(running(tmp_path, "prefill"), running(tmp_path, "decode"), 1)
    processes = {name: getattr(pair, name).process for name in ("prefill", "decode")}
    killer = threading.Timer(0.5, processes[dead].kill)
    killer.start()
    try:
        with pytest.raises(ServerError, match=f"The {dead} server ended with exit code -9"):
            serve.keep_serving(pair, SimpleNamespace(port=1))
    finally:
        killer.join()
        pair.stop()
    assert all(process.poll() is not None for process in processes.values())


@pytest.mark.parametrize("times", [1, 3])
def test_a_pair_is_stopped_however_often_one_asks_for_it(tmp_path, times) -> None:
    program = f"""
import signal, sys, threading
sys.path[:0] = [{str(SCRIPTS)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from types import SimpleNamespace
import _disaggregated, _disaggregated_serve as serve, test_disaggregated as tests
folder = Path({str(tmp_path)!r})
class Pair(_disaggregated.Pair):
    def __enter__(self):
        return self
def keep(args):
    with Pair(tests.running(folder, "prefill"), tests.running(folder, "decode"), 1) as pair:
        print(pair.prefill.process.pid, pair.decode.process.pid, flush=True)
        serve.keep_serving(pair, SimpleNamespace(port=1))
serve.serve, serve.parse = keep, lambda words: None
sys.exit(serve.main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    process.stdout.readline()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (130, "[ascend-patch] stopped")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def listing(folder: Path, **found: str) -> Path:
    """An interpreter whose `-m ascend_patch list --json` says this of kv_connector."""
    patch = {"id": "kv_connector", "applies_to": "these releases", **found}
    program = folder / "python"
    text = json.dumps({"patches": [{"id": "rotary", "state": "armed", "reason": ""}, patch]})
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    return program


def test_heads_that_ranks_cannot_share_are_refused_and_what_is_not_known_is_left_to_vllm(
    tmp_path,
) -> None:
    env = SimpleNamespace(python=listing(tmp_path, state="armed", reason=""))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    for sizes in (Sizes(2, 1), Sizes(1, 4), Sizes(4, 4)):
        serve.refuse_what_cannot_start(env, {}, tmp_path, sizes)
    with pytest.raises(SetupError, match=r"4 attention heads, which 3 ranks .*--prefill-tp"):
        serve.refuse_what_cannot_start(env, {}, tmp_path, Sizes(3, 1))
    with pytest.raises(SetupError, match="--decode-tp"):
        serve.refuse_what_cannot_start(env, {}, tmp_path, Sizes(1, 8))
    serve.refuse_what_cannot_start(env, {}, tmp_path / "a-name-on-a-hub", Sizes(3, 1))


def test_a_release_without_the_patch_is_refused_where_the_sizes_differ(tmp_path) -> None:
    env = SimpleNamespace(python=listing(tmp_path, state="skipped", reason="vllm 0.11.0 is old"))
    serve.refuse_what_cannot_start(env, {}, tmp_path, Sizes(2, 2))
    with pytest.raises(SetupError, match=r"TP 2 -> 1 needs kv_connector.*skipped.*0.11.0 is old"):
        serve.refuse_what_cannot_start(env, {}, tmp_path, Sizes(2, 1))
    newer = SimpleNamespace(python=listing(tmp_path, state="retired", reason="vLLM has it"))
    serve.refuse_what_cannot_start(newer, {}, tmp_path, Sizes(2, 1))
