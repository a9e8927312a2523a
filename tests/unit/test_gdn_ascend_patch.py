"""What patch_gdn_attn asks before it takes a step of vllm_ascend's, and what the host knows of it.

The releases' own builders and layers are in tests/ascend.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from ascend_patch.impl import gdn_ascend_blocks as blocks  # noqa: E402
from ascend_patch.impl import gdn_ascend_served as served  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.gdn import build_chunk_metadata, chunk, chunk_triton  # noqa: E402

NPU, CPU = (SimpleNamespace(type=name) for name in ("npu", "cpu"))


def call(layout="VK", dtype=torch.bfloat16):
    chunks = build_chunk_metadata(torch.tensor([0, 5, 70]), torch.device("cpu"))
    sizes = (64, 128) if layout == "KV" else (128, 64)
    return served.chunk_call(
        torch.empty(70, 2 * 2 * 64 + 4 * 128, dtype=dtype),
        torch.empty(70, 4, 128, dtype=dtype),
        torch.float32,
        chunks,
        torch.empty(3, 4, *sizes),
        layout,
        None,
        None,
    )


@pytest.mark.parametrize("layout", ["VK", "KV"])
def test_the_call_that_is_asked_about_is_the_one_that_is_made(layout):
    made = call(layout)
    assert made.q.shape == made.k.shape == (70, 2, 64)
    assert made.v.shape == made.out.shape == (70, 4, 128)
    assert made.state_shape == (4, 64, 128)
    # Slices of one row, as the convolution returns them.
    assert {x.stride() for x in (made.q, made.k)} == {(768, 64, 1)}
    assert made.v.stride() == (768, 128, 1)
    assert chunk_triton.supports(made) == (True, "")
    assert not chunk_triton.supports(call(layout, torch.float32))[0]


@pytest.fixture
def offer():
    """Offer a kernel for NPUs that answers so."""

    def register(*answer):
        kernel = dispatch.Implementation("kernel", lambda _: None, lambda _: answer)
        dispatch.register(chunk.OPERATOR, "npu", kernel)

    yield register
    dispatch.unregister(chunk.OPERATOR, "npu", "kernel")


def test_a_reference_serves_on_a_cpu_and_on_nothing_else(offer):
    assert served.refusal(chunk.OPERATOR, CPU, call()) == ""
    refusal = served.refusal(chunk.OPERATOR, NPU, call())
    assert refusal == "chunk_gated_delta_rule on npu: no kernel is offered"
    offer(False, "K must be 64")
    assert served.refusal(chunk.OPERATOR, NPU, call()).endswith("npu: kernel: K must be 64")
    offer(True, "")
    assert served.refusal(chunk.OPERATOR, NPU, call()) == ""


class Table:
    """vllm-ascend's BlockTable, as far as it is looked at."""

    def __init__(self, rows: int, columns: int, generator) -> None:
        cpu = torch.randint(0, 99, (rows, columns), generator=generator, dtype=torch.int32)
        self.block_table = SimpleNamespace(cpu=cpu, gpu=cpu.clone())


@pytest.fixture
def tables(seed):
    generator = torch.Generator().manual_seed(seed)
    made = [Table(6, 4, generator), Table(8, 1, generator)]
    for n in range(len(made)):  # and hold on to none of them
        blocks.remember(lambda *_: None, made[n], (), {})
    yield made
    blocks._tables.difference_update(made)


def test_rows_are_found_by_the_table_that_they_are_the_first_of(tables):
    for table in tables:
        buffer = table.block_table
        assert torch.equal(blocks.on_host(buffer.gpu[:3]), buffer.cpu[:3])
        assert blocks.on_host(buffer.gpu[:0]) is None
        assert blocks.on_host(buffer.gpu[1:]) is None, "the rows of other requests"
        assert blocks.on_host(buffer.gpu.clone()) is None
    assert blocks.on_host(tables[0].block_table.gpu[:3, :2].contiguous()) is None


def test_a_table_goes_with_its_runner(tables):
    before = len(blocks._tables)
    tables.pop()
    assert len(blocks._tables) == before - 1


def batch(table, mode="none"):
    config = SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=mode))
    builder = SimpleNamespace(vllm_config=config, kv_cache_spec=SimpleNamespace(block_size=64))
    return builder, SimpleNamespace(block_table_tensor=table.block_table.gpu[:5])


LENGTHS = torch.tensor([3, 0, 70, 0, 0])


def test_slots_are_the_first_column_and_zero_behind_the_last_request(tables):
    builder, common = batch(tables[0])
    found = blocks.slots(builder, common, LENGTHS, LENGTHS + 5)
    column = tables[0].block_table.cpu[:5, 0].tolist()
    assert found.tolist() == [*column[:3], 0, 0]


def test_with_prefix_caching_they_are_the_column_of_the_last_token(tables):
    builder, common = batch(tables[0], "align")
    seq_lens = torch.tensor([64, 65, 192, 0, 0])
    found = blocks.slots(builder, common, LENGTHS, seq_lens)
    rows = tables[0].block_table.cpu
    assert found.tolist() == [int(rows[0, 0]), int(rows[1, 1]), int(rows[2, 2]), 0, 0]


def test_of_another_table_nothing_is_known(tables):
    builder, common = batch(tables[0])
    common.block_table_tensor = common.block_table_tensor.clone()
    assert blocks.slots(builder, common, LENGTHS, LENGTHS) is None
