"""The messages of vLLM's Mooncake connector (0.16 to 0.18), with one optional field of the shim.

The host's own structures travel as maps without a version: what a peer does not know it ignores.
So a patched and an unpatched side understand each other where the host's own fields say it all.
Where they do not, the field that an unpatched prefill server requires is left out on purpose: it
refuses the message instead of pushing what it believes was asked for.

    ask      decode -> prefill: these blocks of this request, please
    accepted prefill -> decode: heard, and this is how my caches lie
    ready    prefill -> decode: prefilled; may I write?
    go       decode -> prefill: write
    done     prefill -> decode: written
    failed   prefill -> decode: not written, and nothing will be; `again` if asking again may help
    cancel   decode -> prefill: I gave this attempt up, or with `last` the request: free its blocks

Until it said `go` a decode rank may give its blocks away at any time; from then on it may not
before it has heard `done` or `failed` of this attempt, or its writer is known to have ended (see
`kv_vllm_quarantine`). A message that is lost is said again every few seconds, and one that comes
twice is answered twice: an epoch is the same attempt. `go` returns the nonce (of the process) and
the job (of the attempt) that came with `accepted`: who has another one must not write.
"""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec

from ascend_patch._log import get_logger
from ascend_patch.impl import kv_limits

ASK, GO, CANCEL = "ask", "go", "cancel"
ACCEPTED, READY, DONE, FAILED = "accepted", "ready", "done", "failed"
# Comes with each answer: see `kv_vllm_process`.
PROCESS_PORT = "process_port"

# Of an attempt that another process accepted. From ascend-patch 0.1.0 also of one that it has
# forgotten and may be writing for: it says nothing about whether somebody writes.
RESTARTED = "this prefill server was restarted meanwhile"
# What a peer is told of an error that is no sentence.
INTERNAL = "this server met an internal error; its log says more"

# Of vLLM's own tree: its workers show no other package's lines.
log = get_logger("ascend_patch.kv")


class _Refusals:
    """Counts what is refused, so that a flood of it is not one of lines."""

    def __init__(self) -> None:
        self._last, self._silent = -math.inf, 0

    def __call__(self, sentence: str) -> None:
        """Log it; at most one in a second, with the number of those between."""
        now = time.monotonic()
        if now - self._last < 1:
            self._silent += 1
            return
        others = f" (and {self._silent} other refusals before it)" if self._silent else ""
        self._last, self._silent = now, 0
        log.warning("%s%s", sentence, others)


log_refusal = _Refusals()


class MessageError(ValueError):
    """A message that cannot be read; the text is a sentence that its sender may be told."""


class Ask(msgspec.Struct):
    """MooncakeXferMetadata of the host, in which nothing is required, and the shim's field.

    What is zero is sent all the same: the host requires it.
    """

    remote_hostname: str | msgspec.UnsetType = msgspec.UNSET
    remote_port: int = 0
    remote_tp_size: int = 0
    remote_tp_rank: int = 0
    req_blocks: dict[str, tuple[str, list[int]]] = {}
    kv_caches_base_addr: list[int] = []
    ascend_patch: dict[str, Any] | None = None


NOTHING = msgspec.Raw(b"\xc0")


class _Parts(msgspec.Struct):
    """The same, with what may be long not yet read."""

    remote_hostname: str | msgspec.UnsetType = msgspec.UNSET
    remote_port: int = 0
    remote_tp_size: int = 0
    remote_tp_rank: int = 0
    req_blocks: msgspec.Raw = msgspec.Raw(b"\x80")
    kv_caches_base_addr: msgspec.Raw = msgspec.Raw(b"\x90")
    ascend_patch: msgspec.Raw = NOTHING


class Answer(msgspec.Struct, omit_defaults=True):
    """MooncakeXferResponse of the host, and the shim's field. Its `status` is never left out."""

    status: int
    ok_reqs: list[str] | None = None
    err_reqs: list[str] | None = None
    err_msg: str | None = None
    ascend_patch: dict[str, Any] | None = None


def answer_of(
    said: dict[str, Any],
    epoch: str,
    state: str,
    requests: list[str],
    sentence: str = "",
    *,
    again: bool = False,
    job: int = 0,
) -> Answer:
    """The answer about an attempt.

    Args:
        said: What this side says of itself.
        requests: The request of the attempt.
        sentence: Why it failed.
        job: The number of the attempt here; 0 if nothing is kept of it.
    """
    return Answer(
        status=CONTINUE if state in (ACCEPTED, READY) else FINISH,
        ok_reqs=requests if state == DONE else None,
        err_reqs=requests if state == FAILED else None,
        err_msg=sentence or None,
        ascend_patch=said | {"epoch": epoch, "state": state, "again": again, "job": job},
    )


# MooncakeXferResponseStatus
FINISH, CONTINUE, ERROR = 0, 1, 2
# A block id or an address takes up to so many bytes.
_ID, _ADDRESS = 5, 9

encode = msgspec.msgpack.Encoder().encode
_read_answer = msgspec.msgpack.Decoder(Answer).decode
_read_parts = msgspec.msgpack.Decoder(_Parts).decode
_read_field = msgspec.msgpack.Decoder(dict[str, Any] | None).decode
_read_blocks = msgspec.msgpack.Decoder(dict[str, tuple[str, list[int]]]).decode
_read_addresses = msgspec.msgpack.Decoder(list[int]).decode


def decode_answer(data: bytes) -> Answer:
    """Read an answer of a prefill rank.

    Raises:
        MessageError: It is none.
    """
    if len(data) > kv_limits.MAX_ANSWER:
        raise MessageError(f"the answer has {len(data)} bytes; {kv_limits.MAX_ANSWER} are read")
    try:
        return _read_answer(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the answer cannot be read: {_plain(error)}") from error


class AskDecoder:
    """Reads what is sent to a prefill rank, part by part: a length is known before its content."""

    def decode(self, data: bytes) -> Ask:
        """Read a message.

        Raises:
            MessageError: It is none, or longer than any that a decode rank sends.
        """
        _check_length("the message", data, kv_limits.MAX_MESSAGE)
        try:
            parts = _read_parts(data)
            field = memoryview(parts.ascend_patch)
            _check_length("the field of ascend_patch", field, kv_limits.MAX_FIELD)
            addresses = memoryview(parts.kv_caches_base_addr)
            _check_length("kv_caches_base_addr", addresses, _ADDRESS * kv_limits.MAX_REGIONS)
            ours = _read_field(field)
            blocks = memoryview(parts.req_blocks)
            if ours is not None:
                # One request; an unpatched decode rank sends those of a step together.
                longest = _ID * kv_limits.MAX_REQUEST_BLOCKS + kv_limits.MAX_FIELD
                _check_length("req_blocks", blocks, longest)
            return Ask(
                parts.remote_hostname,
                parts.remote_port,
                parts.remote_tp_size,
                parts.remote_tp_rank,
                _read_blocks(blocks),
                _read_addresses(addresses),
                ours,
            )
        except MessageError:
            raise
        except (ValueError, RecursionError) as error:
            raise MessageError(f"the message cannot be read: {_plain(error)}") from error


def _check_length(name: str, data: bytes | memoryview, most: int) -> None:
    if len(data) > most:
        raise MessageError(f"{name} has {len(data)} bytes; {most} are read")


def _plain(error: Exception) -> str:
    """What is wrong with bytes, without the names of functions."""
    if isinstance(error, msgspec.MsgspecError):
        return str(error)
    return "it is nested too deeply" if isinstance(error, RecursionError) else "it is no UTF-8"


def ask_decoder() -> AskDecoder:
    """What reads a message to a prefill server."""
    return AskDecoder()
