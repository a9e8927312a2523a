"""Mooncake's bootstrap server in vLLM: how it starts, and what a decode rank reads from one."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_limits
from ascend_patch.impl.kv_vllm_wire import log, log_refusal

QUERY_S = 10.0
START_S = 30.0
MOST_ENGINES = 1024
# The second server of one that listens on IPv4.
SECOND = "ascend_patch_ipv6"


class QueryError(Exception):
    """A bootstrap server that cannot be asked; the message is a sentence."""


async def query(address: str) -> dict[str, dict[int, str]]:
    """Prefill engine -> tensor-parallel rank -> address, as a bootstrap server says it.

    Raises:
        QueryError: It gives no answer, or one that cannot be used.
    """
    import httpx

    try:
        async with (
            httpx.AsyncClient(timeout=QUERY_S) as client,
            client.stream("GET", f"{address}/query") as response,
        ):
            response.raise_for_status()
            data = bytearray()
            async for part in response.aiter_bytes():
                data += part
                if len(data) > kv_limits.MAX_QUERY:
                    raise QueryError(
                        f"the bootstrap server at {address} says more than "
                        f"{kv_limits.MAX_QUERY} bytes"
                    )
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise QueryError(
            f"the bootstrap server at {address} gives no answer ({type(error).__name__}: {error})"
        ) from error
    return read_agents(address, bytes(data))


def read_agents(address: str, data: bytes) -> dict[str, dict[int, str]]:
    """The same, from what it said.

    Prefill servers whose ranks are not those from 0, or have no addresses, are left out.

    Raises:
        QueryError: It cannot be read.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise QueryError(f"the answer of the bootstrap server at {address} is no JSON") from error
    if not isinstance(said, dict) or len(said) > MOST_ENGINES:
        raise QueryError(
            f"the answer of the bootstrap server at {address} does not name 0 to {MOST_ENGINES} "
            "prefill servers"
        )
    found = {}
    for entry in said.values():
        try:
            engine, agents = _engine(entry)
        except kv_limits.LimitError as error:
            # The others may be in order; who asks for this one hears that it is not known.
            log_refusal(f"kv pull: an entry of the bootstrap server at {address}: {error}")
            continue
        found[engine] = agents
    return found


def _engine(entry: Any) -> tuple[str, dict[int, str]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("worker_addr"), dict):
        raise kv_limits.LimitError("a prefill server has no worker_addr")
    engine = kv_limits.text("engine_id", entry.get("engine_id"))
    given = entry["worker_addr"]
    # Ranks that register while others have not leave gaps; who asks then asks again.
    ranks = {str(rank) for rank in range(min(len(given), kv_limits.MAX_TP))}
    if set(given) != ranks:
        raise kv_limits.LimitError(
            f"worker_addr of {engine} does not name the ranks from 0 to {len(given) - 1}"
        )
    found = {}
    for rank, stages in given.items():
        address = stages.get("0") if isinstance(stages, dict) else None
        kv_limits.endpoint(f"the address of rank {rank} of {engine}", address)
        found[int(rank)] = str(address)
    return engine, found


def start(wrapped: Callable[..., Any], instance: Any, *args: Any, **kwargs: Any) -> None:
    """MooncakeBootstrapServer.start: a taken port is said, and IPv6 is listened to where it is.

    Raises:
        RuntimeError: The address cannot be bound.
    """
    if instance.server_thread:
        wrapped(*args, **kwargs)
        return
    _probe(instance.host, instance.port)
    wrapped(*args, **kwargs)
    # The host names 0.0.0.0, and an address of IPv6 is what its decode servers are given.
    if instance.host == "0.0.0.0" and ":" in _own_address():
        _probe("::", instance.port)
        setattr(instance, SECOND, _serve(instance.app, instance.port))


def _own_address() -> str:
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def _probe(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    name = kv_limits.session(host, port)
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RuntimeError(
                f"Port {port} of {host} is taken ({error.strerror}), and Mooncake's bootstrap "
                "server needs it; set VLLM_MOONCAKE_BOOTSTRAP_PORT to a free one."
            ) from error
        raise RuntimeError(
            f"Mooncake's bootstrap server cannot listen at {name} ({error.strerror}); this machine "
            "must have that address."
        ) from error


def _serve(app: Any, port: int) -> Any:
    """A second server of the same application, at [::]; it ends with the process."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app=app, host="::", port=port, lifespan="off"))
    thread = threading.Thread(target=server.run, name="mooncake_bootstrap_ipv6", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError(
                f"Mooncake's bootstrap server did not start at [::]:{port} within {START_S:.0f} s"
            )
        time.sleep(0.05)
    log.info("kv connector: the bootstrap server listens at [::]:%d too", port)
    return server
