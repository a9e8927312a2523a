"""What 0.18.0's and 0.23.0's builders make for their kernels, and how it reaches the device.

Import it in an environment's process, after `ascend_gdn` or a platform. Tables are compared with
what each kernel derives of cu_seqlens, sequence by sequence.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from gdn_staging import Late

CHUNK, LARGE = 64, 1216
HEADS = 4
# Tokens of a block of the cumulative sum: 2**18 elements of 64 rows for each head.
CUMSUM = 1024


def lengths_of(seed: int, count: int) -> list[list[int]]:
    """Batches: empty sequences in every place, long ones, and many."""
    generator = torch.Generator().manual_seed(seed)
    batches = [[128, 0, 128], [0, 5], [64, 0, 0, 65, 1, 0], [1300, 70], [0, 0, 3, 0]]
    while len(batches) < count:
        size = int(torch.randint(1, 9, (), generator=generator))
        drawn = torch.randint(0, 300, (size,), generator=generator)
        drawn[torch.rand(size, generator=generator) < 0.3] = 0
        drawn[-1] += 1
        batches.append(drawn.tolist())
    return batches


def tables(lengths: list[int], block: int = CUMSUM) -> dict[str, list]:
    """By definition: a program's sequence and its part of it; where a sequence's chunks begin."""

    def pairs(size):
        return [[n, c] for n, length in enumerate(lengths) for c in range(-(-length // size))]

    chunks = [-(-length // CHUNK) for length in lengths]
    offsets = [sum(chunks[:n]) for n in range(len(chunks) + 1)]
    updates = [sum(c + 1 for c in chunks[:n]) for n in range(len(chunks) + 1)]
    return {
        "chunk_indices_chunk64": pairs(CHUNK),
        "chunk_offsets_chunk64": offsets,
        "update_chunk_offsets_chunk64": updates,
        "final_chunk_indices_chunk64": [n - 1 for n in updates[1:]],
        "chunk_indices_large_block": pairs(LARGE),
        "block_indices_cumsum": pairs(block),
    }


def wrong(metadata, lengths: list[int]) -> list[str]:
    """The tables that are not what they should be."""
    found = []
    for name, expected in tables(lengths).items():
        got = getattr(metadata, name)
        if got.tolist() != expected or got.dtype != torch.int32:
            found.append(name)
    return found


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Builder:
    """All that the functions of a builder's module ask of one."""

    def __init__(self, max_num_seqs: int = 8) -> None:
        self.use_spec_decode = False
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=4096
            ),
            model_config=SimpleNamespace(
                hf_text_config=SimpleNamespace(linear_num_value_heads=HEADS)
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )


class Buffer:
    """vLLM's CpuGpuBuffer on a device whose copies are late."""

    late: Late

    def __init__(self, *size, dtype, device, pin_memory, with_numpy) -> None:
        self.cpu = torch.full(size, -1, dtype=dtype)

    def copy_to_gpu(self, n: int) -> torch.Tensor:
        return self.late.send(self.cpu[:n])[0]


def by_two_in_turn(batches, in_flight: int, max_num_seqs: int = 8) -> list[list[str]]:
    """What arrives of 0.18.0's own tables, with so many builds ahead of the device."""
    module = importlib.import_module("vllm_ascend.patch.worker.patch_gdn_attn")
    late = Buffer.late = Late()
    module.CpuGpuBuffer, kept = Buffer, module.CpuGpuBuffer
    try:
        builder = Builder(max_num_seqs)
        module._ensure_chunk_meta_state(builder, SimpleNamespace(type="npu"))
        return _arrived(
            lambda b: module._build_non_spec_chunked_prefill_meta(builder, starts(b)),
            batches, late, in_flight,
        )  # fmt: skip
    finally:
        module.CpuGpuBuffer = kept


def by_ours(batches, in_flight: int, build) -> list[list[str]]:
    """The same of ours: `build` is called with lengths and with the device that is late."""
    from ascend_patch.impl import gdn_metadata
    from ascend_patch.kernels.gdn import PinnedStaging

    late, npu = Late(), torch.device("npu")
    staging = PinnedStaging(npu, transfer=late)
    kept, gdn_metadata.staging_of = gdn_metadata.staging_of, lambda *_: staging
    try:
        return _arrived(lambda b: build(b, npu), batches, late, in_flight)
    finally:
        gdn_metadata.staging_of = kept


def ours_0_18(lengths: list[int], device: torch.device):
    from ascend_patch.impl import gdn_ascend_metadata, gdn_metadata

    batch = SimpleNamespace(num_prefills=1)
    sizes = (CHUNK, LARGE, CUMSUM)
    chunks = gdn_metadata.attach(batch, Builder(), starts(lengths), device, chunk_sizes=sizes)
    return gdn_ascend_metadata._tables_0_18(chunks, CUMSUM)


def ours_0_23(lengths: list[int], device: torch.device):
    module = importlib.import_module("vllm_ascend.ops.gdn_attn_builder")
    return module._build_non_spec_chunked_prefill_metadata(Builder(), starts(lengths), device)


def _arrived(build, batches, late: Late, in_flight: int) -> list[list[str]]:
    made = []
    for batch in batches:
        # A build sends six tables, or all of them at once.
        late.catch_up(in_flight)
        made.append((build(batch), batch))
    late.catch_up()
    return [wrong(metadata, batch) for metadata, batch in made]
