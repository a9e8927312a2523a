"""The messages of vLLM's Mooncake connector (0.16 to 0.18), with one optional field for ours.

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
before it has heard `done` or `failed`, or the peer is gone. A message that is lost is said again
every few seconds, and one that comes twice is answered twice: an epoch is the same attempt.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

ASK, GO, CANCEL = "ask", "go", "cancel"
ACCEPTED, READY, DONE, FAILED = "accepted", "ready", "done", "failed"

# Of vLLM's own tree: its workers show no other package's lines.
log = logging.getLogger("vllm.ascend_patch.kv")


class Ask(msgspec.Struct):
    """MooncakeXferMetadata of the host, in which nothing is required, and our field.

    What is zero is sent all the same: the host requires it.
    """

    remote_hostname: str | msgspec.UnsetType = msgspec.UNSET
    remote_port: int = 0
    remote_tp_size: int = 0
    remote_tp_rank: int = 0
    req_blocks: dict[str, tuple[str, list[int]]] = {}
    kv_caches_base_addr: list[int] = []
    ascend_patch: dict[str, Any] | None = None


class Answer(msgspec.Struct, omit_defaults=True):
    """MooncakeXferResponse of the host, and our field. Its `status` is never left out."""

    status: int
    ok_reqs: list[str] | None = None
    err_reqs: list[str] | None = None
    err_msg: str | None = None
    ascend_patch: dict[str, Any] | None = None


# MooncakeXferResponseStatus
FINISH, CONTINUE, ERROR = 0, 1, 2

encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def ask_decoder() -> Any:
    """What reads a message to a prefill server."""
    return msgspec.msgpack.Decoder(Ask)
