"""Reads the schemas that a torch_npu registers out of its shared libraries; nothing is imported.

A schema is a string constant there. Compilers may copy it by blocks of 16 bytes instead, which then
lie about in any order; such a schema cannot be read, but whether a known one is there can be told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = {"npu": "libtorch_npu.so", "atb": "libop_plugin_atb.so"}
# What we call, and what the hosts call of attention, caches, rotary embeddings and norms.
OPERATORS = (
    "atb::_npu_flash_attention",
    "atb::_npu_flash_attention_qlens",
    "atb::_npu_flash_attention_unpad",
    "atb::_npu_paged_attention",
    "atb::_npu_paged_attention_get_workspace",
    "atb::_npu_paged_attention_splitfuse",
    "atb::_npu_reshape_and_cache",
    "atb::_npu_rotary_embedding",
    "atb::npu_paged_cache_load",
    "atb::npu_paged_cache_load.out",
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace",
    "npu::npu_add_rms_norm",
    "npu::npu_add_rms_norm_v2",
    "npu::npu_apply_rotary_pos_emb",
    "npu::npu_attention_update",
    "npu::npu_fused_infer_attention_score",
    "npu::npu_fused_infer_attention_score.out",
    "npu::npu_fused_infer_attention_score_v2",
    "npu::npu_fused_infer_attention_score_v2.out",
    "npu::npu_fusion_attention",
    "npu::npu_gather_pa_kv_cache",
    "npu::npu_gemma_rms_norm",
    "npu::npu_interleave_rope",
    "npu::npu_kv_rmsnorm_rope_cache",
    "npu::npu_mrope",
    "npu::npu_prompt_flash_attention",
    "npu::npu_rms_norm",
    "npu::npu_rotary_mul",
    "npu::npu_scatter_nd_update_",
    "npu::npu_scatter_pa_kv_cache",
)
_BLOCK = 16
_SCHEMA = re.compile(rb"[ -~]+?\((?:[A-Z][ -~]*)?\) -> [ -~]+")


class Libraries:
    """The shared libraries of an unpacked torch_npu.

    Args:
        package: The folder `torch_npu`.

    Raises:
        FileNotFoundError: it lacks one of them.
    """

    def __init__(self, package: Path) -> None:
        self._bytes = {
            namespace: (package / "lib" / name).read_bytes()
            for namespace, name in LIBRARIES.items()
        }

    def whole(self) -> dict[str, str]:
        """Qualified operator name to its schema's text, for those that lie there in one piece.

        Raises:
            ValueError: there are two for one name.
        """
        found: dict[str, str] = {}
        for name in OPERATORS:
            namespace, _, short = name.partition("::")
            texts = set(_texts(self._bytes[namespace], short))
            if len(texts) > 1:
                raise ValueError(f"{name} has more than one schema: {sorted(texts)}")
            if texts:
                found[name] = texts.pop()
        return found

    def holds(self, name: str, text: str) -> bool:
        """Is a schema's text there, in blocks?

        What is left at the end is a block that overlaps its neighbour, or numbers of 8 and 4
        bytes in the code; fewer bytes than that say nothing.
        """
        data, raw = self._bytes[name.partition("::")[0]], text.encode()
        whole = len(raw) - len(raw) % _BLOCK
        blocks = [raw[at : at + _BLOCK] for at in range(0, whole, _BLOCK)]
        rest, missing = raw[whole:], [block for block in blocks if block not in data]
        if raw[-_BLOCK:] in data:
            return not missing
        numbers = [rest[:8], rest[8:12]] if len(rest) >= 8 else [rest[:4]]
        return not missing and all(number in data for number in numbers if len(number) >= 4)

    def names(self, name: str) -> bool:
        """Is there an operator of this name at all, whatever its schema?"""
        namespace, _, short = name.partition("::")
        return f"{short}\0".encode() in self._bytes[namespace]


def _texts(data: bytes, short: str) -> Iterable[str]:
    """Each schema of that name: from the name, which stands alone, to the end of the string."""
    start = f"{short}(".encode()
    at = data.find(start)
    while at >= 0:
        text = data[at : data.index(b"\0", at)]
        alone = not re.match(rb"\w", data[at - 1 : at])
        if alone and _SCHEMA.fullmatch(text) and _parses(text.decode("ascii")):
            yield text.decode("ascii")
        at = data.find(start, at + 1)


def _parses(text: str) -> bool:
    """Not where only a beginning is in one piece, and other strings follow it."""
    import torch

    try:
        torch._C.parse_schema(text)
    except RuntimeError:
        return False
    return True


def canonical(name: str, text: str) -> str:
    """The text as torch prints it, with its namespace, so that spelling makes no difference."""
    import torch

    return str(torch._C.parse_schema(f"{name.partition('::')[0]}::{text}"))


def read(packages: Mapping[str, Path]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The schemas of several releases.

    Args:
        packages: release -> its folder `torch_npu`, oldest first.

    Returns:
        release -> qualified name -> canonical schema, and a line for each that was not read in one
        piece: recognised block by block as another release's, or not at all.
    """
    libraries = {release: Libraries(package) for release, package in packages.items()}
    whole = {release: library.whole() for release, library in libraries.items()}
    found: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for release, library in libraries.items():
        own = found[release] = {n: canonical(n, text) for n, text in whole[release].items()}
        for name in OPERATORS:
            if name in own or not library.names(name):
                continue
            others = [texts[name] for texts in whole.values() if name in texts]
            fitting = {canonical(name, t): t for t in others if library.holds(name, t)}
            if len(fitting) == 1:
                own[name] = next(iter(fitting))
                notes.append(f"{release}: {name} recognised by its blocks")
            else:
                notes.append(f"{release}: {name} is there; its schema could not be read")
    return found, notes


def render(found: Mapping[str, Mapping[str, str]]) -> str:
    """schemas.json: the releases, and of each operator where its schema changed."""
    histories: dict[str, list[list[str | None]]] = {}
    for name in OPERATORS:
        history: list[list[str | None]] = []
        for release, schemas in found.items():
            schema = schemas.get(name)
            before = history[-1][1] if history else None
            if schema != before:
                history.append([release, schema])
        histories[name] = history
    data: dict[str, Any] = {"operators": histories, "releases": list(found)}
    return json.dumps(data, indent=1) + "\n"


def releases_of(path: Path) -> list[str]:
    """The releases that schemas.json has."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return list(data["releases"])


def differences(before: str, after: str) -> Iterable[str]:
    """What is not the same in two renderings, a line each."""
    old, new = json.loads(before), json.loads(after)
    if old["releases"] != new["releases"]:
        yield f"releases: {old['releases']} -> {new['releases']}"
    for name in OPERATORS:
        was, now = old["operators"].get(name), new["operators"].get(name)
        if was != now:
            yield f"{name}: {was} -> {now}"
