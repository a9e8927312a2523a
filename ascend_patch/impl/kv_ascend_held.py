"""vllm-ascend's MooncakeConnectorV1: what decode read was its request's, to the end of the read.

Prefill may free a request's blocks while they are read: when they expire, when another peer says
that it has read them, when it is started again under the same engine id. Each attempt has a number
that prefill's scheduler draws and the request brings along; after a read decode asks for it.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections import OrderedDict
from typing import Any

from ascend_patch.impl import kv_ascend_book as books
from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl import kv_handshake
from ascend_patch.impl.kv_ascend_listener import HELD_MSG

# In kv_transfer_params, and in what workers are told of a request.
ATTEMPT = "ascend_patch_attempt"
# In what the workers of prefill are told, for all requests that are to be kept.
ATTEMPTS = "ascend_patch_attempts"
# Of a receiving thread: prefill's name of a request -> its attempt.
NAME = "ascend_patch_held"
REMEMBERED = 16384
# Prefill's workers hear of a request's end one step after decode may have it.
ANNOUNCED_S, AGAIN_S = 3.0, 0.02
ANSWER_MS = 2000
# In a prefill rank's metadata: it can be asked.
ANSWERS = "ascend_patch_answers"


def draw(scheduler: Any, request: str) -> str:
    """A number of prefill's scheduler for a request that it keeps."""
    found = secrets.token_hex(8)
    scheduler.__dict__.setdefault(ATTEMPTS, {})[request] = found
    return found


def tell(scheduler: Any, metadata: Any) -> None:
    """The workers of prefill are told which attempts are kept."""
    drawn = scheduler.__dict__.pop(ATTEMPTS, None)
    if drawn:
        setattr(metadata, ATTEMPTS, drawn)


def announced(worker: Any, metadata: Any) -> None:
    """A prefill rank was told which requests it keeps from now on."""
    if worker.kv_send_thread is not None and metadata.requests_to_send:
        drawn = getattr(metadata, ATTEMPTS, {})
        books.of(worker.kv_send_thread).announced(drawn, metadata.requests_to_send)


def of_request(given: dict[str, Any] | None) -> str:
    """The attempt that a request brings along; empty if it brings none that could be one."""
    try:
        return limits.attempt((given or {}).get(ATTEMPT))
    except limits.LimitError:
        return ""


def note(thread: Any, request: str, meta: Any) -> None:
    """A new request of a receiving thread."""
    known = thread.__dict__.setdefault(NAME, OrderedDict())
    known[getattr(meta, "remote_request_id", request)] = getattr(meta, ATTEMPT, "")
    while len(known) > REMEMBERED:
        known.popitem(last=False)


class Encoder:
    """The encoder of a receiving thread: who says that a read has ended, and of which attempt."""

    def __init__(self, encoder: Any, thread: Any) -> None:
        self._encode = encoder.encode
        self._thread = thread
        self._done = importlib.import_module(type(thread).__module__).DONE_RECVING_MSG
        name = f"{thread.local_engine_id}:{thread.tp_rank}:{thread.local_handshake_port}"
        self._reader = name[:200]

    def encode(self, message: Any) -> bytes:
        """As msgspec's; an unpatched prefill rank does not read what is added."""
        if message[0] == self._done:
            attempt = self._thread.__dict__.get(NAME, {}).get(message[1], "")
            pull = getattr(self._thread.decoder.asked, "pull", "")
            said = {"reader": f"{self._reader}:{pull}", "attempt": attempt}
            message = (*message, {kv_handshake.FIELD: said})
        found: bytes = self._encode(message)
        return found


def check(thread: Any, request: str, host: str, port: int) -> None:
    """Whether a prefill rank has a request's blocks still: what was read of them is the request's.

    Args:
        request: Prefill's name of it.

    Raises:
        LookupError: It has not, or does not answer.
    """
    attempt = thread.__dict__.get(NAME, {}).get(request, "")
    deadline = time.monotonic() + ANNOUNCED_S
    while True:
        answer = ask(thread, host, port, (HELD_MSG, request, attempt))
        if answer == books.HELD:
            return
        if answer != books.WAIT or time.monotonic() > deadline:
            raise LookupError(
                f"the prefill rank at {host}:{port} does not have the blocks of request "
                f"{request:.100} any more: they expired, somebody else said that they were read, "
                "or it was started again; what was read may be another request's"
            )
        time.sleep(AGAIN_S)


def ask(thread: Any, host: str, port: int, message: tuple[Any, ...]) -> bytes:
    """The answer of a prefill rank to a message.

    Raises:
        LookupError: There is none.
    """
    import zmq

    socket = thread._get_remote_socket(host, port)
    answered = False
    try:
        socket.send(thread.encoder.encode(message))
        if not socket.poll(ANSWER_MS):
            raise LookupError(f"the prefill rank at {host}:{port} does not answer")
        found: bytes = socket.recv()
        answered = True
        return found
    except zmq.ZMQError as error:
        raise LookupError(f"the prefill rank at {host}:{port} cannot be asked: {error}") from None
    finally:
        if answered:
            thread._return_remote_socket(socket, host, port)
        else:
            socket.close(linger=0)
