"""A prefill and a decode server with vLLM's Mooncake connector, and what a proxy does for them."""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import _env
import _installer
from _server import HOST, Server, cpu_variables, free_port
from _system import ensure_system

# The engine without CUDA: TCP, and RDMA where the machine has it.
ENGINE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
QUERY_SECONDS = 10


def engine_folder(python: Path) -> Path:
    """Return the folder for PYTHONPATH that has Mooncake's engine; installed when it is needed."""
    folder = _env.cache_root() / ENGINE.replace("==", "-")
    with _env.locked(folder):
        marker = folder / _env.MARKER
        if not marker.exists():
            ensure_system(["rdma"])
            _installer.install_folder(folder, ENGINE, _env.cache_root(), python=python)
            marker.touch()
    return folder


@dataclass(frozen=True)
class Sizes:
    """Tensor-parallel sizes of a pair."""

    prefill: int = 1
    decode: int = 1

    def __str__(self) -> str:
        return f"TP {self.prefill} -> {self.decode}"


def transfer_arguments(role: str, extra: Mapping[str, Any], policy: str = "") -> list[str]:
    """vLLM's arguments for one side; `role` is kv_producer or kv_consumer."""
    config = {
        "kv_connector": "MooncakeConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"mooncake_protocol": "tcp", **extra},
    }
    if policy:
        config["kv_load_failure_policy"] = policy
    return ["--kv-transfer-config", json.dumps(config)]


@dataclass
class Timed:
    """An answer through the pair, and when its first token was there, in seconds."""

    answer: Any
    prefill: float
    first_token: float


@dataclass
class Pair:
    """A prefill and a decode server that run; a context manager that starts and stops both.

    Attributes:
        bootstrap: Port of the prefill server's bootstrap server.
    """

    prefill: Server
    decode: Server
    bootstrap: int
    engines: dict[int, str] = field(default_factory=dict)

    def __enter__(self) -> Pair:
        try:
            # Both at once: most of a start is imports.
            self.prefill.start()
            self.decode.start()
            self.prefill.wait_until_ready()
            self.decode.wait_until_ready()
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

    def stop(self) -> None:
        """Stop both."""
        try:
            self.decode.stop()
        finally:
            self.prefill.stop()

    @property
    def address(self) -> str:
        """Of the bootstrap server, as decode requests name it."""
        return f"http://{HOST}:{self.bootstrap}"

    def engine(self) -> str:
        """The prefill server's engine id."""
        connection = http.client.HTTPConnection(HOST, self.bootstrap, timeout=QUERY_SECONDS)
        try:
            connection.request("GET", "/query")
            found = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.prefill.failed(
                f"The bootstrap server does not answer: {error!r}."
            ) from error
        finally:
            connection.close()
        engine: str = found["0"]["engine_id"]
        return engine

    def decode_parameters(self, transfer: str, engine: str = "") -> dict[str, Any]:
        """What a decode request says of where its KV is."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer,
            "remote_engine_id": engine or self.engine(),
            "remote_bootstrap_addr": self.address,
        }

    def complete(self, prompt: str | Sequence[int], *, seconds: float = 120, **options: Any) -> Any:
        """Ask prefill and then decode, as a proxy does; greedily unless told otherwise."""
        return self.timed(prompt, seconds=seconds, **options).answer

    def timed(
        self,
        prompt: str | Sequence[int],
        *,
        seconds: float = 120,
        engine: str = "",
        **options: Any,
    ) -> Timed:
        """The same, with the times; `engine` saves asking for the prefill server's id."""
        began = time.monotonic()
        transfer = uuid.uuid4().hex
        payload = {"model": "model", "prompt": prompt, "temperature": 0, **options}
        self.prefill.post("/v1/completions", prefill_payload(payload, transfer), seconds)
        prefilled = time.monotonic() - began
        payload["kv_transfer_params"] = self.decode_parameters(transfer, engine)
        answer = self.decode.post("/v1/completions", payload, seconds)
        return Timed(answer, prefilled, time.monotonic() - began)


def prefill_payload(payload: Mapping[str, Any], transfer: str) -> dict[str, Any]:
    """What prefill is asked where a client asks for `payload`: one token, and to keep its KV."""
    asked = {**payload, "max_tokens": 1, "stream": False}
    asked.pop("stream_options", None)
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    asked["kv_transfer_params"] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": transfer,
    }
    return asked


def variables(env: Mapping[str, str], tp: int, bootstrap: int) -> dict[str, str]:
    """The environment of one of the two servers."""
    return {
        **env,
        **cpu_variables(tp),
        "VLLM_HOST_IP": HOST,
        "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap),
    }


def make_pair(
    python: Path,
    model: str,
    sizes: Sizes,
    *,
    env: Mapping[str, str],
    folder: Path,
    arguments: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    policy: str = "",
    ready_seconds: float = 300,
) -> Pair:
    """Return a pair, not started; each server's log is in `folder`."""
    bootstrap = free_port()
    servers = [
        Server(
            python,
            model,
            env=variables(env, tp, bootstrap),
            log=folder / f"{name}.txt",
            arguments=[
                *arguments,
                "--tensor-parallel-size",
                str(tp),
                *transfer_arguments(role, extra or {}, policy),
            ],
            ready_seconds=ready_seconds,
        )
        for name, role, tp in (
            ("prefill", "kv_producer", sizes.prefill),
            ("decode", "kv_consumer", sizes.decode),
        )
    ]
    return Pair(servers[0], servers[1], bootstrap)
