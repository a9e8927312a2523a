"""Range checks of everything that a KV connector takes from the network, before it is used.

The hosts' protocols have no authentication: whoever reaches a port may send anything. Each function
takes the name of a field and its value, and returns the value, or raises a `LimitError` that says
what was found and what was expected. A bool is no whole number here, though Python says so.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from ascend_patch.kernels.kv_layout import Side

# Sizes of a server. The largest that are served today are a quarter of these.
MAX_TP, MAX_PP, MAX_WORLD, MAX_CONTEXT_PARALLEL = 256, 256, 8192, 256
MAX_GROUPS, MAX_LAYERS, MAX_PARTS, MAX_KV_HEADS, MAX_WIDTH = 8, 1024, 8, 4096, 1 << 20
MAX_REGIONS = MAX_LAYERS * MAX_PARTS
MAX_BLOCK_SIZE, MAX_ITEMSIZE = 1 << 20, 16
# Of a server's caches, and of one request: two million tokens in blocks of 16.
MAX_NUM_BLOCKS, MAX_REQUEST_BLOCKS = 2**31 - 1, 1 << 17
MAX_TOKENS = 1 << 31
# Requests that an unpatched decode server asks for in one message.
MAX_REQUESTS = 4096
# Addresses are computed in int64.
ADDRESS_END = 2**63
MAX_TEXT, MAX_ID, MAX_HOST, MAX_URL = 4096, 1024, 253, 2048
# Bytes: of a message to a prefill rank, of the shim's field in it, of an answer to it, and of what
# a bootstrap server says.
MAX_MESSAGE, MAX_FIELD, MAX_ANSWER, MAX_QUERY = 4 << 20, 64 << 10, 256 << 10, 4 << 20
# A message to a prefill rank is its sender and one frame; an answer is one frame.
MAX_FRAMES = 3

_HOST = re.compile(r"[A-Za-z0-9._:%-]+", re.ASCII)
_ENDPOINT = re.compile(r"tcp://(\[[^\[\]]+\]|[^\[\]:]+):([0-9]{1,5})", re.ASCII)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


class LimitError(ValueError):
    """A value from the network that is not what it must be; the message is a sentence."""


def _refuse(name: str, value: object, expected: str) -> LimitError:
    return LimitError(f"{name} is {_short.repr(value)}; it must be {expected}")


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise _refuse(name, value, f"a whole number from {least} to {most}")
    return value


def optional(name: str, value: Any, least: int, most: int) -> int | None:
    """The same, or None."""
    return None if value is None else whole(name, value, least, most)


def text(name: str, value: Any, most: int = MAX_ID, *, least: int = 1) -> str:
    """Printable text of `least` to `most` characters."""
    if type(value) is not str or not least <= len(value) <= most or not value.isprintable():
        raise _refuse(name, value, f"printable text of {least} to {most} characters")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise _refuse(name, value, "true or false")
    return value


def sequence(name: str, value: Any, most: int) -> Sequence[Any]:
    """A list of at most `most` entries."""
    if not isinstance(value, list | tuple) or len(value) > most:
        raise _refuse(name, value, f"a list of at most {most} entries")
    return value


def rank(name: str, value: Any, size: int) -> int:
    """A rank of a server of this size."""
    return whole(name, value, 0, size - 1)


def port(name: str, value: Any) -> int:
    """A TCP port."""
    return whole(name, value, 1, 65535)


def host_name(name: str, value: Any) -> str:
    """A host name, an IPv4 address or an IPv6 address (without brackets)."""
    text(name, value, MAX_HOST)
    if not _HOST.fullmatch(value):
        raise _refuse(name, value, "a host name or an IP address")
    return str(value)


def endpoint(name: str, value: Any) -> tuple[str, int]:
    """(host, port) of a ZMQ address such as tcp://10.0.0.1:4000 or tcp://[::1]:4000."""
    text(name, value, MAX_HOST + len("tcp://[]:65535"))
    found = _ENDPOINT.fullmatch(value)
    if found is None:
        raise _refuse(name, value, "an address such as tcp://10.0.0.1:4000")
    host = host_name(f"the host of {name}", found[1].strip("[]"))
    return host, port(f"the port of {name}", int(found[2]))


def session(host: str, number: int) -> str:
    """The name of an engine to Mooncake: host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"


def url(name: str, value: Any) -> str:
    """The address of a bootstrap server."""
    text(name, value, MAX_URL)
    if not value.startswith(("http://", "https://")) or " " in value:
        raise _refuse(name, value, "a URL such as http://10.0.0.1:8998")
    return str(value)


def block_ids(name: str, values: Any, num_blocks: int = MAX_NUM_BLOCKS) -> list[int]:
    """Ids of a request's blocks: numbers below `num_blocks`, of which none comes twice."""
    found = list(sequence(name, values, MAX_REQUEST_BLOCKS))
    # In C where all is well: a long prompt has tens of thousands of blocks.
    if found and (set(map(type, found)) != {int} or min(found) < 0 or max(found) >= num_blocks):
        for one in found:
            whole(f"an id of {name}", one, 0, num_blocks - 1)
    if len(set(found)) != len(found):
        raise LimitError(f"{name} names a block twice; each must be another one")
    return found


def addresses(name: str, values: Any, sizes: Sequence[int]) -> list[int]:
    """Addresses of regions of these sizes in bytes: each above 0, and its end below 2**63."""
    found = list(sequence(name, values, MAX_REGIONS))
    if len(found) != len(sizes):
        raise LimitError(
            f"{name} has {len(found)} addresses; the plan has {len(sizes)} regions: the two sides "
            "do not hold the same layers"
        )
    for number, (one, size) in enumerate(zip(found, sizes, strict=True)):
        if type(one) is not int or not 0 < one <= ADDRESS_END - size:
            limit = f"an address above 0 whose {size} bytes end below 2**63"
            raise _refuse(f"{name}[{number}]", one, limit)
    return found


def side(found: Side) -> Side:
    """How a server cuts its caches, within what a plan may cost.

    A plan for one pair of ranks takes a few milliseconds at the largest sizes.
    """
    whole("tp", found.tp, 1, MAX_TP)
    whole("pp", found.pp, 1, MAX_PP)
    whole("tp * pp", found.tp * found.pp, 1, MAX_WORLD)
    whole("context_parallel", found.context_parallel, 1, MAX_CONTEXT_PARALLEL)
    whole("block_size", found.block_size, 1, MAX_BLOCK_SIZE)
    whole("itemsize", found.itemsize, 1, MAX_ITEMSIZE)
    whole("kv_cache_groups", found.kv_cache_groups, 1, MAX_LAYERS)
    flag("combined", found.combined)
    for name in ("layout", "dtype", "storage"):
        text(name, getattr(found, name), 32)
    stages = sequence("stages", found.stages, MAX_PP)
    for one in stages:
        whole("layers of a pipeline stage", one, 1, MAX_LAYERS)
    if not 1 <= len(found.groups) <= MAX_GROUPS:
        raise LimitError(f"there are {len(found.groups)} groups of layers; 1 to {MAX_GROUPS} fit")
    for group in found.groups:
        text("the name of a group of layers", group.name, 64)
        flag("draft", group.draft)
        whole(f"layers of {group.name}", group.layers, 1, MAX_LAYERS)
        whole(f"kv_heads of {group.name}", group.kv_heads, 1, MAX_KV_HEADS)
        if not 1 <= len(group.widths) <= MAX_PARTS:
            raise LimitError(
                f"{group.name} has {len(group.widths)} parts of a token; 1 to {MAX_PARTS} fit"
            )
        for width in group.widths:
            whole(f"a width of {group.name}", width, 1, MAX_WIDTH)
    layers = sum(group.layers for group in found.groups)
    if layers > MAX_LAYERS:
        raise LimitError(f"there are {layers} layers; 1 to {MAX_LAYERS} fit")
    return found
