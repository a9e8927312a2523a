"""The convolution and norm kernels compiled for an H200, where there is none: registers and loads.

A variant that spills registers, or that reads bfloat16 in pieces of less than 16 bytes, is slow on
any GPU; both are seen without one. Needs a triton for NVIDIA, whose ptxas comes with it.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gdn_conv_oracle import ConvCase, make_conv
from gdn_norm_judge import NormCase, make_norm

torch = pytest.importorskip("torch", reason="torch is not installed")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ascend_patch.kernels import dispatch, gdn  # noqa: E402
from ascend_patch.kernels.gdn import (  # noqa: E402
    conv,
    conv_tiles,
    conv_triton,
    gated_norm,
    gated_norm_triton,
)

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1"}
MODEL: dict[str, Any] = {"channels": 8192, "dtype": "bfloat16", "bias": False}


@pytest.fixture
def taken() -> Any:
    """Calls that reached an implementation."""
    calls: list[Any] = []
    names = (conv.OPERATOR, conv.UPDATE, gated_norm.OPERATOR)
    for name in names:
        dispatch.register(name, "cpu", dispatch.Implementation("t", calls.append, priority=99))
    yield calls
    for name in names:
        dispatch.unregister(name, "cpu", "t")


def compile_for(kernel: Any, values: Any, constants: dict[str, Any], warps: int) -> Any:
    """What a launch with these arguments compiles on an H200."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, attributes = {}, dict(constants), {}
    for parameter, value in zip(kernel.params, values, strict=False):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], fixed[name], aligned = "constexpr", 1, False
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    names = [parameter.name for parameter in kernel.params]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(compiled: Any, folder: Path) -> int:
    """Bytes of registers that ptxas put into memory."""
    import triton.backends.nvidia as nvidia

    tool = Path(next(iter(nvidia.__path__)), "bin", "ptxas")
    if not tool.exists():
        pytest.skip(f"{tool} is missing")
    (folder / "k.ptx").write_text(compiled.asm["ptx"])
    call = [str(tool), "-v", "--gpu-name=sm_90a", str(folder / "k.ptx"), "-o", "/dev/null"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def check(compiled: Any, folder: Path, loads: int, stores: int) -> None:
    ptx = compiled.asm["ptx"]
    wide = [len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st")]
    print(wide, spilled(compiled, folder))
    assert wide[0] >= loads
    assert wide[1] >= stores
    assert spilled(compiled, folder) == 0


@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("table", [True, False])
def test_prefill(taken: Any, tmp_path: Path, width: int, table: bool) -> None:
    from ascend_patch.kernels.gdn.conv_kernel import conv_kernel

    case = ConvCase((65, 3), width=width, table=table, **MODEL)
    gdn.causal_conv1d(**make_conv(case, 0).arguments)
    tiles = conv_tiles.prefill_tiles(8192, 2, "cuda")
    values, constants = conv_triton.arguments(taken[0], tiles, "cuda")
    compiled = compile_for(conv_kernel, values, constants, tiles.warps)
    # Of 8 elements each: a tile once for each tap, the first from the state too.
    each = tiles.tile * tiles.channels // (32 * tiles.warps * 8)
    check(compiled, tmp_path, (2 * width - 1) * each, each)


@pytest.mark.parametrize("accepted", [(), (1, 2)])
def test_update(taken: Any, tmp_path: Path, accepted: tuple[int, ...]) -> None:
    from ascend_patch.kernels.gdn.conv_update_kernel import conv_update_kernel

    case = ConvCase((1, 1), accepted=accepted, plain=not accepted, places=4, **MODEL)
    gdn.causal_conv1d_update(**make_conv(case, 0, update=True).arguments)
    tiles = conv_tiles.update_tiles(8192, 2, "cuda")
    values, constants = conv_triton.update_arguments(taken[0], tiles, "cuda")
    compiled = compile_for(conv_update_kernel, values, constants, tiles.warps)
    # Three places, the token and the four taps; three places and the result.
    each = tiles.channels // (32 * tiles.warps * 8)
    check(compiled, tmp_path, 8 * each, 4 * each)


@pytest.mark.parametrize("tokens", [1, 8192])
def test_norm(taken: Any, tmp_path: Path, tokens: int) -> None:
    from ascend_patch.kernels.gdn.gated_norm_kernel import gated_norm_kernel

    gdn.gated_rms_norm(**make_norm(NormCase((tokens, 32, 128), dtype="bfloat16"), 0))
    tiles = gated_norm_triton.tiles_of(1, tokens * 32, 128, "cuda")
    values, constants = gated_norm_triton.arguments(taken[0], tiles)
    compiled = compile_for(gated_norm_kernel, values, constants, tiles.warps)
    each = tiles.rows * 128 // (32 * tiles.warps * 8)
    check(compiled, tmp_path, 2 * each, each)
