"""The merge kernel compiled for a GPU that is not there: what its instructions say."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from ascend_patch.kernels.kv_layout import merge, merge_triton
from ascend_patch.kernels.kv_layout.cases import MergeCase, make_inputs


def call_of(case: MergeCase) -> merge.MergeCall:
    """The checked call of a case."""
    caches, ids, staging = make_inputs(case, 0)
    dim = 1 if case.combined else None
    parts = merge._parts(caches, dim)
    sources = parts if staging is None else merge._parts(staging, dim)
    return merge.MergeCall(parts, sources, tuple(ids), case.shards)


def for_gpu(case: MergeCase, architecture: int = 90) -> dict[str, object]:
    """Widths of loads and stores of the data, registers, spills; whether a barrier is between."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ascend_patch.kernels.kv_layout.merge_kernel import merge_kernel

    prepared = merge_triton.prepare(call_of(case))
    item = prepared.values[0].element_size()
    kinds = {"base": f"*i{8 * item}", "places": "*i64", "ids": "*i64", "groups": "*i64"}
    kinds |= {"tasks": "i32", "blocks": "i32"} | dict.fromkeys(prepared.constants, "constexpr")
    aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    source = ASTSource(merge_kernel, kinds, dict(prepared.constants), aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": prepared.warps})
    text = compiled.asm["ptx"]
    # Numbers and tables are loaded first, one by one; the rest of the loads are the data.
    loads = list(re.finditer(r"ld\.global\.(\S+)", text))
    stores = list(re.finditer(r"st\.global\.(\S+)", text))
    data = [match for match in loads if match[1] == stores[0][1]]
    between = text[data[-1].end() : stores[0].start()]
    return {
        "loads": {match[1] for match in data},
        "stores": {match[1] for match in stores},
        "apart": data[-1].end() < stores[0].start() and "bar.sync" in between,
        **assembled(text, architecture),
    }


def assembled(text: str, architecture: int) -> dict[str, int]:
    """Registers and spilled bytes, by the assembler that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        command = [str(tool), "-v", f"-arch=sm_{architecture}a", str(path), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stderr + done.stdout
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"registers": int(re.findall(r"Used (\d+) registers", said)[-1]), "spilled": spilled}
