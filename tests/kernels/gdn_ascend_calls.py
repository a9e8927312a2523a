"""chunk_gated_delta_rule's cases as launches on an NPU, ours and vllm-ascend's own."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_patch.kernels.gdn import cases, chunk, chunk_ascend
from ascend_patch.kernels.gdn.metadata import build_chunk_metadata

CORES, VECTOR_CORES = 20, 40
# What copies, of what vllm-ascend's launches are prepared with.
_COPIES = ("clone", "copy_", "_to_copy", "contiguous")


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](**given)``."""

    kernel: Any
    grid: tuple[int, int, int]
    given: dict[str, Any]

    @property
    def jit(self) -> Any:
        """The kernel without what computes constants for it."""
        return _jit(self.kernel)

    @property
    def name(self) -> str:
        return str(self.jit.fn.__name__)

    def compile(self) -> Any:
        return self.kernel.warmup(**self.given, grid=self.grid)

    def arguments(self) -> list[Any]:
        """What a launch hands over: `ascend_hivm.count` takes it."""
        found: list[Any] = []
        for n, parameter in enumerate(self.jit.params):
            value = self.given.get(parameter.name)
            if parameter.is_constexpr or value is None:
                continue
            if isinstance(value, torch.Tensor):
                known = value.device.type == "cpu" and not value.is_floating_point()
                found.append((n, 0, (), value.flatten().tolist() if known else None))
            elif isinstance(value, float) or value != 1 or parameter.do_not_specialize:
                found.append(value)
        return found


def _jit(kernel: Any) -> Any:
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel


def make_call(case: cases.ChunkCase, seed: int = 0, device: str = "meta") -> chunk.Call:
    """The call that an implementation is given; on `meta` without data, but for integers."""
    small = replace(case, lengths=(1,) * len(case.lengths)) if device == "meta" else case
    made = cases.make_inputs(small, seed)
    starts = torch.tensor([0, *case.lengths]).cumsum(0)
    tokens = case.tokens

    def placed(x: torch.Tensor) -> torch.Tensor:
        if device != "meta":
            return x[0]
        shape = (tokens, *x.shape[2:])
        return torch.empty_strided(shape, x.stride()[1:], dtype=x.dtype, device="meta")

    q, k, v, g, beta = (placed(made[name]) for name in ("q", "k", "v", "g", "beta"))
    held = made.get("state", made.get("initial_state"))
    if held is not None and device == "meta":
        held = held.to("meta")
    final = made.get("state") if held is None else held
    if "state" not in made:
        final = torch.empty(len(case.lengths), *case.state_shape, device=device)
    return chunk.Call(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=case.key_size**-0.5,
        out=torch.full(v.shape, float("nan"), dtype=v.dtype, device=v.device),
        metadata=build_chunk_metadata(starts, torch.device("cpu")),
        initial=held,
        final=final,
        state_indices=made.get("state_indices"),
        has_initial_state=made.get("has_initial_state"),
        state_layout=case.layout,
        normalise=case.normalise,
    )


def ours(call: chunk.Call, cores: int = CORES) -> list[Launch]:
    return [
        Launch(kernel, (n, 1, 1), _named(kernel, values) | constants)
        for kernel, n, values, constants in chunk_ascend.launches(call, cores)
    ]


def _named(kernel: Any, values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((p.name for p in _jit(kernel).params), values, strict=False))


def least(call: chunk.Call) -> int:
    """Bytes that any implementation moves: inputs and results once, a state in and out."""
    tokens = call.starts[-1]
    rows = sum(
        x[:1].numel() * x.element_size()
        for x in (call.q, call.k, call.v, call.g, call.beta, call.out)
    )
    moved = tokens * rows
    count = len(call.starts) - 1
    kept = range(count) if call.state_indices is None else call.state_indices.tolist()
    carried = [True] * count
    if call.has_initial_state is not None:
        carried = call.has_initial_state.tolist()
    for state, wanted in ((call.initial, carried), (call.final, [True] * count)):
        if state is not None:
            size = state[0].numel() * state.element_size()
            moved += size * sum(
                w and (call.state_indices is None or slot >= 0)
                for slot, w in zip(kept, wanted, strict=True)
            )
    return moved


class Copies(TorchDispatchMode):
    """Counts what torch copies on the way: operators and bytes, read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _COPIES and result.device.type == "meta":
            self.operators += 1
            self.bytes += 2 * result.numel() * result.element_size()
        return result


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are noted in place of being run."""
    from triton.runtime import jit

    found: list[Launch] = []
    real = jit.JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = _named(self, args) | kwargs
        shape = grid(bound) if callable(grid) else grid
        # The size that its host code gives them means nothing here, and is warned about.
        for option in ("num_warps", "num_stages"):
            bound.pop(option, None)
        found.append(Launch(self, (*shape, 1, 1)[:3], bound))

    jit.JITFunction.run = note
    try:
        yield found
    finally:
        jit.JITFunction.run = real


def theirs(case: cases.ChunkCase, source: Path) -> tuple[list[Launch], Copies]:
    """The launches of vllm-ascend's own pipeline, by its own host code; what torch copies there.

    ``source`` is a checkout of vllm-ascend 0.18.0. The layer's own gather and scatter of states are
    not part of it.
    """
    with _hosted(source):
        fla = importlib.import_module("vllm_ascend.ops.triton.fla.chunk")
        norm = importlib.import_module("vllm_ascend.ops.triton.fla.l2norm")
    call = make_call(case)
    # It takes contiguous tensors; making them so is what its input_guard does.
    q, k, v, g, beta = (x[None] for x in (call.q, call.k, call.v, call.g, call.beta))
    count = len(case.lengths)
    shape = count, case.value_heads, case.key_size, case.value_size
    state = torch.empty(shape, dtype=torch.float32, device="meta")
    starts = torch.tensor(call.starts, dtype=torch.int32)
    copies = Copies()
    with copies, recorded() as found:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        if case.normalise:
            q, k = norm.l2norm_fwd(q), norm.l2norm_fwd(k)
        fla.chunk_gated_delta_rule_fwd(
            q, k, v, g, beta, case.key_size**-0.5, state, True, cu_seqlens=starts
        )
    return found, copies


@contextlib.contextmanager
def _hosted(source: Path) -> Iterator[None]:
    """Its modules without vLLM, torch_npu or the package's own start-up."""
    import triton
    import triton.language as tl

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(members, __path__=[])
        sys.modules[name] = made

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        module(name)
    for name in ("vllm.model_executor.layers.fla", "vllm.model_executor.layers.fla.ops"):
        module(name)
    module("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    module("vllm.distributed", get_pcp_group=lambda: SimpleNamespace(world_size=1))
    context = SimpleNamespace(attn_metadata=None)
    module("vllm.forward_context", get_forward_context=lambda: context)
    module("vllm.model_executor.layers.fla.ops.utils", SUPPRESS_LEVEL=0)
    for name in ("vllm_ascend", "vllm_ascend.ops", "vllm_ascend.ops.triton"):
        module(name)
        sys.modules[name].__path__ = [str(source.joinpath(*name.split(".")))]
    module("vllm_ascend.ops.triton.fla")
    sys.modules["vllm_ascend.ops.triton.fla"].__path__ = [
        str(source / "vllm_ascend" / "ops" / "triton" / "fla")
    ]
    utils = importlib.import_module("vllm_ascend.ops.triton.triton_utils")
    utils._NUM_AICORE, utils._NUM_VECTORCORE = CORES, VECTOR_CORES
    yield
