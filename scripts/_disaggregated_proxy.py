"""A small proxy before a prefill and a decode server: a request goes to one, then the other.

Answers are passed on as they come, streams too. It is for one machine and for looking at: what a
production proxy does besides (balancing, retries, authentication) it does not.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from _disaggregated import Pair, prefill_payload
from _server import HOST, Server, ServerError

PATHS = ("/v1/completions", "/v1/chat/completions")
SECONDS = 600
CHUNK = 65536


class Proxy:
    """A running proxy; a context manager that starts and stops it.

    The port is bound at once, before there are servers: whoever asks early waits.

    Args:
        port: 0 for a free one.
        report: Called for each request with a line: how long prefill and the first token took.

    Raises:
        ServerError: The port cannot be had.
    """

    def __init__(self, pair: Pair, port: int, report: Callable[[str], None] = print) -> None:
        self.pair, self.report = pair, report
        self.first_tokens: list[float] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.get(self)

            def do_POST(self) -> None:
                proxy.post(self)

            def log_message(self, *words: Any) -> None:
                """Its own lines are enough."""

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"The proxy cannot listen at {HOST}:{port} ({error}); name another port with "
                "--port, or none for a free one."
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        """Pass on what is about no request: /health, /v1/models, /metrics."""
        pass_on(handler, self.pair.decode, "GET", None)

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        """Prefill, then decode."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if handler.path not in PATHS:
            pass_on(handler, self.pair.decode, "POST", body)
            return
        began, transfer = time.monotonic(), uuid.uuid4().hex
        try:
            payload = json.loads(body)
            asked = prefill_payload(payload, transfer)
            self.pair.prefill.post(handler.path, asked, SECONDS)
            payload["kv_transfer_params"] = self.pair.decode_parameters(transfer)
        except (ServerError, ValueError) as error:
            refuse(handler, f"prefill: {error}")
            return
        prefilled = time.monotonic() - began

        def note() -> None:
            first = time.monotonic() - began
            self.first_tokens.append(first)
            self.report(
                f"{handler.path}: prefilled in {1e3 * prefilled:.0f} ms, first bytes after "
                f"{1e3 * first:.0f} ms"
            )

        body = json.dumps(payload).encode()
        pass_on(handler, self.pair.decode, "POST", body, note)


def pass_on(
    handler: BaseHTTPRequestHandler,
    server: Server,
    method: str,
    body: bytes | None,
    note: Callable[[], None] = lambda: None,
) -> None:
    """Ask a server and hand on what it says; `note` is called with its first bytes, before."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=SECONDS)
    try:
        connection.request(method, handler.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        chunk = response.read1(CHUNK)
        note()
        handler.send_response(response.status)
        kind = response.headers.get("Content-Type", "application/json")
        handler.send_header("Content-Type", kind)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while chunk:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.flush()
            chunk = response.read1(CHUNK)
        handler.wfile.write(b"0\r\n\r\n")
    except (OSError, http.client.HTTPException) as error:
        refuse(handler, f"decode: {error!r}")
    finally:
        connection.close()


def refuse(handler: BaseHTTPRequestHandler, sentence: str) -> None:
    """Answer with an error in the form of the API."""
    body = json.dumps({"error": {"message": sentence, "type": "proxy_error", "code": 502}}).encode()
    handler.close_connection = True
    try:
        handler.send_response(502)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
    except OSError:
        # The client is gone; nobody is left to tell.
        return
