"""Holds the boxed kernel to CPU results, operator by operator, with PyTorch's samples (OpInfo).

For each sample: the result and its aliasing, the variant that writes into given tensors (out=), the
one in place, and the same with arguments that are not contiguous. Runs on the software NPU.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import traceback
import warnings
from collections import Counter

import torch
import torch_npu  # noqa: F401
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

warnings.filterwarnings("ignore")
NPU = torch.device("npu:0")
# Their results are random, or memory that nobody has written; only shapes are compared.
RANDOM = {
    "bernoulli", "cauchy", "empty", "empty_like", "empty_permuted", "empty_strided", "exponential",
    "geometric", "log_normal", "multinomial", "new_empty", "new_empty_strided", "normal", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "uniform",
    "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
    "pca_lowrank", "svd_lowrank", "resize_", "resize_as_",
}  # fmt: skip
# torch_npu's own sentence, which it has for an NPU too.
ONLY_CONTIGUOUS = "Only c10::MemoryFormat::Contiguous is supported"
# Some of their tensors belong on the host, on every device.
HOST_ARGUMENTS = {"tensor_split"}
# PyTorch refuses their out= on every device but those it names.
NO_OUT = {"mode"}
# Their samples do not make tensors on the device they are given, or need what the CPU lacks.
LEFT_OUT = {
    "sparse.mm": "sparse tensors have no npu form here",
    "sparse.sampled_addmm": "sparse tensors have no npu form here",
    "to_sparse": "sparse tensors have no npu form here",
    "sparse.mm_reduce": "sparse tensors have no npu form here",
}


def padded(leaf: torch.Tensor) -> torch.Tensor:
    """Return the same values with another element behind each in memory."""
    if not leaf.dim() or not leaf.numel():
        return leaf.detach().clone()
    wide = leaf.new_zeros((*leaf.shape[:-1], 2 * leaf.shape[-1]))
    wide[..., ::2] = leaf.detach()
    return wide[..., ::2]


def laid_out(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device in the same layout, on which results' strides depend."""
    base = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return base.copy_(leaf.detach())


def kept(tree, *, strided: bool = False):
    """Return a tree with copies of its tensors on the CPU."""
    return _mapped(tree, strided, torch.device("cpu"))


def moved(tree, *, strided: bool = False):
    """Return a tree with copies of its tensors on the npu."""
    return _mapped(tree, strided, NPU)


def _mapped(tree, strided: bool, device: torch.device):
    def one(leaf):
        if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
            return leaf
        if strided:
            wide = padded(leaf)
            base = laid_out(torch.as_strided(wide, (wide.untyped_storage().nbytes()
                            // wide.itemsize,), (1,), 0), device)  # fmt: skip
            return base.as_strided(wide.shape, wide.stride(), wide.storage_offset())
        return laid_out(leaf, device)

    return pytree.tree_map(one, tree)


def attempt(call):
    """Return what a call on the CPU gives, or None where the CPU refuses it."""
    try:
        return call()
    except Exception:
        return None


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def agree(name: str, there, here, *, strides: bool = True) -> None:
    """Raise unless two results are the same in structure, dtype, shape, strides and value."""
    torch.npu.synchronize()  # some samples ask for copies to the host that do not block
    found, wanted = tensors(there), tensors(here)
    assert len(found) == len(wanted), (len(found), len(wanted))
    for one, other in zip(found, wanted, strict=True):
        assert one.device.type in ("npu", other.device.type), one.device
        assert (one.dtype, one.shape) == (other.dtype, other.shape), (one.dtype, one.shape)
        if other.layout != torch.strided:
            continue
        if strides and other.numel() > 1:
            assert one.stride() == other.stride(), (one.stride(), other.stride())
        if name in RANDOM:
            continue
        near = {"rtol": 1e-5, "atol": 1e-6}
        if name == "nn.functional.scaled_dot_product_attention":
            near = {"rtol": 1e-4, "atol": 1e-4}  # the CPU has a fused kernel of its own
        value = one.detach().resolve_conj().resolve_neg().cpu()
        torch.testing.assert_close(value, other.detach(), equal_nan=True, **near)
    numbers = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, (int, float, bool))]
        for tree in (there, here)
    ]
    assert name in RANDOM or str(numbers[0]) == str(numbers[1]), numbers


def aliased(result, arguments) -> list[bool]:
    """Say for each tensor of a result whether it lies in an argument's memory."""
    where = {t.untyped_storage().data_ptr() for t in tensors(arguments) if t.numel()}
    return [
        t.layout == torch.strided and t.numel() > 0 and t.untyped_storage().data_ptr() in where
        for t in tensors(result)
    ]


def one_sample(op, sample, counts: Counter) -> None:
    call = (sample.input, sample.args, sample.kwargs)
    kwargs = {**sample.kwargs}
    if isinstance(kwargs.get("device"), (str, torch.device)):
        kwargs["device"] = "cpu"
    there_kwargs = {**kwargs}
    if "device" in kwargs:
        there_kwargs["device"] = NPU
    here_in, there_in = kept(call[:2]), moved(call[:2])
    there_kwargs = moved(there_kwargs)
    if op.name in HOST_ARGUMENTS:
        there_in = (there_in[0], here_in[1])
    here = attempt(lambda: op(here_in[0], *here_in[1], **kwargs))
    if here is None:
        counts["refused by the CPU once its storage is compact"] += 1
        return
    there = op(there_in[0], *there_in[1], **there_kwargs)
    agree(op.name, there, here)
    assert aliased(there, there_in) == aliased(here, here_in), (
        "aliases", aliased(there, there_in), aliased(here, here_in),
    )  # fmt: skip
    counts["forward"] += 1
    if not tensors(call[:2]) or op.name in HOST_ARGUMENTS:
        return

    spread = kept(call[:2], strided=True)
    wanted = attempt(lambda: op(spread[0], *spread[1], **kwargs))
    if wanted is not None:
        spread = moved(call[:2], strided=True)
        agree(op.name, op(spread[0], *spread[1], **there_kwargs), wanted)
        counts["strided"] += 1

    outs = tensors(here)
    if op.supports_out and outs and op.name not in RANDOM | NO_OUT:
        single = isinstance(here, torch.Tensor)

        def into(given, inputs, more):
            return op(inputs[0], *inputs[1], **more, out=given[0] if single else tuple(given))

        given = [torch.empty(0, dtype=t.dtype) for t in outs]
        done = attempt(lambda: into(given, kept(call[:2]), kwargs)) is not None
        # PyTorch's fft_ihfft2 and fft_ihfftn leave out= as it is, where they are given sizes.
        if done and not all(map(torch.Tensor.numel, given)) and all(map(torch.Tensor.numel, outs)):
            counts["out= that the CPU does not write"] += 1
        elif done:
            given = [torch.empty(0, dtype=t.dtype, device=NPU) for t in outs]
            fresh = moved(call[:2])
            into(given, fresh, there_kwargs)
            agree(op.name, given, outs, strides=False)
            # Into a part of a larger tensor, whose rest has to stay.
            around = [torch.full((t.numel() + 8,), 3, device=NPU).to(t.dtype) for t in outs]
            given = [
                buffer[4 : 4 + t.numel()].view(t.shape)
                for buffer, t in zip(around, outs, strict=True)
            ]
            into(given, fresh, there_kwargs)
            agree(op.name, given, outs, strides=False)
            for buffer in around:
                ends = torch.cat((buffer[:4], buffer[-4:]))
                assert (ends.cpu() == torch.full((8,), 3).to(buffer.dtype)).all(), "beyond out="
            counts["out"] += 1

    in_place = op.get_inplace()
    first = sample.input
    if in_place is None or not isinstance(first, torch.Tensor) or op.name in RANDOM:
        return
    changed = kept(call[:2])
    was = changed[0].data_ptr()
    if attempt(lambda: in_place(changed[0], *changed[1], **kwargs)) is not None:
        fresh = moved(call[:2])
        place = fresh[0].data_ptr()
        result = in_place(fresh[0], *fresh[1], **there_kwargs)
        assert result.data_ptr() == fresh[0].data_ptr()
        assert (fresh[0].data_ptr() == place) == (changed[0].data_ptr() == was)
        agree(op.name, fresh[0], changed[0])
        counts["in place"] += 1


def main(samples: int, seed: int, *only: str) -> None:
    """Print counts and failures as JSON, of so many samples of each operator, or of those named."""
    counts: Counter = Counter()
    failed: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    seen = set()
    began = time.monotonic()
    for op in op_db:
        name = op.formatted_name
        if only and op.name not in only:
            continue
        if op.name in LEFT_OUT:
            unchecked[name] = LEFT_OUT[op.name]
            continue
        dtypes = [torch.float32, torch.int64, torch.bool, torch.complex64]
        dtype = next((d for d in dtypes if d in op.dtypes), None)
        if dtype is None:
            unchecked[name] = "takes none of the dtypes that are tried"
            continue
        torch.manual_seed(seed)
        made = op.sample_inputs("cpu", dtype, requires_grad=False)
        ran = 0
        for sample in itertools.islice(made, samples):
            try:
                op(sample.input, *sample.args, **sample.kwargs)
            except Exception as error:
                unchecked[name] = f"the CPU refuses its own sample: {str(error)[:100]}"
                continue
            try:
                one_sample(op, sample, counts)
                ran += 1
            except Exception as error:
                if ONLY_CONTIGUOUS in str(error):
                    counts["memory format that torch_npu refuses"] += 1
                    continue
                failed.setdefault(name, traceback.format_exc()[-900:])
        if ran:
            seen.add(name)
    took = round(time.monotonic() - began, 1)
    print(json.dumps({
        "operators": len(seen), "counts": counts, "failed": failed, "unchecked": unchecked,
        "seconds": took,
    }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
