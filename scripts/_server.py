"""One vLLM OpenAI server as a child process: start, wait, ask, stop. For scripts and tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import _server_log

HOST = "127.0.0.1"
STOP_SECONDS = 20
# What a front end whose engine is gone may take until it ends by itself.
FATAL_SECONDS = 10
LOG_BYTES = 2**20
# What a server inherits; everything else is said explicitly, so that runs compare.
INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR", "TZ")


class ServerError(Exception):
    """The server did not start, or did not answer; the message says which and where its log is."""


def base_variables() -> dict[str, str]:
    """Environment for a server that stays on this machine."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def cpu_variables(tensor_parallel: int = 1) -> dict[str, str]:
    """What vLLM's CPU worker wants to be told."""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if tensor_parallel > 1:
        # On its own it wants a NUMA node for each rank; give each a share of the cores.
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // tensor_parallel)
        parts = [cores[i * share % len(cores) :][:share] for i in range(tensor_parallel)]
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, p)) for p in parts)
    return variables


def inherited() -> dict[str, str]:
    """Return the few variables of ours that a server started from nothing needs."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def free_port() -> int:
    """Return a port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A running server; a context manager that starts it, waits for it and stops it.

    Args:
        python: The interpreter that has vLLM.
        model: Its folder; served under the name "model".
        env: The server's whole environment.
        log: The file for everything that it prints.
        arguments: More command line for vLLM.
        ready_seconds: How long it may take until it answers.
        progress: Called about once a second while it starts, with the seconds and the log's
            last line.
    """

    def __init__(
        self,
        python: Path,
        model: str,
        *,
        env: Mapping[str, str],
        log: Path,
        arguments: Sequence[str] = (),
        ready_seconds: float = 300,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self.python, self.model, self.env, self.log = python, model, dict(env), log
        self.arguments, self.ready_seconds, self.progress = arguments, ready_seconds, progress
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_in = 0.0

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def command(self) -> list[str]:
        """Return the command line, as a user would type it."""
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.model, "--served-model-name", "model"]
        return [*command, "--host", HOST, "--port", str(self.port), *self.arguments]

    def shell_command(self) -> str:
        """Return the same for a shell that has this process's variables: it runs as it is."""
        changed = {k: v for k, v in self.env.items() if os.environ.get(k) != v}
        gone = sorted(name for name in os.environ if name not in self.env)
        words = [word for name in gone for word in ("-u", name)]
        words += [f"{name}={value}" for name, value in sorted(changed.items())]
        # Python puts its working directory on sys.path, and the one here may be a checkout.
        return f"cd {shlex.quote(str(self.log.parent))} && " + shlex.join(
            ["env", *words, *self.command()]
        )

    def start(self) -> None:
        """Start the process in a session of its own, away from any checkout."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.log.parent,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait for /health.

        Raises:
            ServerError: The server ended, or was not ready in time.
        """
        assert self.process is not None, "start() comes first"
        began = time.monotonic()
        fatal_at = 0.0
        while True:
            elapsed = time.monotonic() - began
            if self.process.poll() is not None:
                raise self.failed(
                    f"The server ended with exit code {self.process.returncode} after "
                    f"{elapsed:.0f} s, before it was ready."
                )
            if not fatal_at and self.engine_is_gone():
                fatal_at = elapsed
            if fatal_at and elapsed > fatal_at + FATAL_SECONDS:
                raise self.failed("The server's engine ended before it was ready.")
            if self.is_healthy():
                self.started_in = elapsed
                return
            if elapsed > self.ready_seconds:
                raise self.failed(f"The server was not ready after {self.ready_seconds:.0f} s.")
            if self.progress is not None:
                self.progress(elapsed, self.last_lines(1))
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        """Whether /health answers 200 now."""
        try:
            return self._request("GET", "/health", None, 5)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def post(self, path: str, payload: Mapping[str, Any], seconds: float = 120) -> Any:
        """Post JSON and return the answer's.

        Raises:
            ServerError: The server refused, ended or did not answer in time.
        """
        body = json.dumps(payload).encode()
        try:
            status, answer = self._request("POST", path, body, seconds, watched=True)
        except (OSError, http.client.HTTPException) as error:
            raise self.failed(f"POST {path} failed: {error!r}.") from error
        if status != 200:
            text = answer.decode(errors="replace")[:500]
            raise self.failed(f"POST {path} was answered with {status}: {text}.")
        return json.loads(answer)

    def failed(self, what: str) -> ServerError:
        """Return the error for what went wrong, with the log's path; of a server that has ended, or
        whose engine has, with the cause that the log has.
        """
        ended = self.process is None or self.process.poll() is not None
        cause = _server_log.cause(self.log_text()) if ended or self.engine_is_gone() else ""
        return ServerError(f"{what}{f' The cause: {cause}.' if cause else ''} Its log: {self.log}")

    def engine_is_gone(self) -> bool:
        """Whether the log says that the engine has ended, though the front end may still run."""
        return _server_log.is_fatal(self.log_text())

    def metric(self, name: str) -> float:
        """Return the sum of a counter or gauge of /metrics, over its labels.

        Raises:
            ServerError: The server has no such metric, or did not answer.
        """
        try:
            _, answer = self._request("GET", "/metrics", None, 10)
        except (OSError, http.client.HTTPException) as error:
            raise self.failed(f"GET /metrics failed: {error!r}.") from error
        lines = [line for line in answer.decode().splitlines() if not line.startswith("#")]
        found = [line.rpartition(" ")[2] for line in lines if line.partition("{")[0] == name]
        if not found:
            raise ServerError(f"/metrics has no {name}. Its log: {self.log}")
        return sum(map(float, found))

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Any:
        """Ask /v1/completions, greedily unless told otherwise."""
        payload = {"model": "model", "prompt": prompt, "temperature": 0, **options}
        return self.post("/v1/completions", payload)

    def last_lines(self, count: int) -> str:
        """Return the end of the log."""
        return "\n".join(self.log_text(300 * count).strip().splitlines()[-count:])

    def log_text(self, last: int = LOG_BYTES) -> str:
        """Return the last bytes of the log as text; empty where there is none."""
        try:
            with open(self.log, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - last))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def stop(self) -> None:
        """End the process and all that it started, gently first; only what is in its session."""
        if self.process is None:
            return
        process, self.process = self.process, None
        for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGTERM, 5)):
            if process.poll() is not None:
                break
            process.send_signal(number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        # Workers normally end with their parent; the group is ours alone (start_new_session),
        # and its id is not given to anybody else while one of them is left.
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + seconds
            try:
                os.killpg(process.pid, number)
                while time.monotonic() < deadline:
                    process.poll()
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                break
        process.wait(5)

    def _request(
        self, method: str, path: str, body: bytes | None, seconds: float, *, watched: bool = False
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=seconds)
        answered = threading.Event()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            if watched:
                watch = (connection.sock, answered)
                threading.Thread(target=self._hang_up_without_engine, args=watch).start()
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            answered.set()
            connection.close()

    def _hang_up_without_engine(self, sock: socket.socket, answered: threading.Event) -> None:
        """End a request that a front end without an engine would leave unanswered."""
        while not answered.wait(1):
            if self.engine_is_gone():
                if not answered.wait(FATAL_SECONDS):
                    # Not close(): that would not wake who reads from it.
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                return
