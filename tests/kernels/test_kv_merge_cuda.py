"""merge_head_shards_ on a GPU, and its kernel compiled for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import kv_judge  # noqa: E402

from ascend_patch.kernels import dispatch, kv_layout  # noqa: E402
from ascend_patch.kernels.kv_layout import cases, merge, merge_reference, merge_triton  # noqa: E402

ALL = (*cases.CASES, *cases.UNEVEN)


@pytest.fixture
def gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    merge_triton.register()
    with dispatch.only(merge_triton.NAME):
        yield "cuda"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_gpu_moves_every_byte(gpu, case, seed):
    assert kv_judge.wrong_bytes(case, seed, gpu) == 0


@pytest.mark.parametrize("shards", [(1, 1), (4, 4), (2,) * 4, (1,) * 8, (1,) * 3, (2, 1)], ids=str)
@pytest.mark.parametrize("staging", [False, True])
def test_many_blocks_in_place_are_the_reference(gpu, shards, staging, seed):
    """Enough programs for all SMs, ten times: a race in place would show now and then."""
    case = cases.MergeCase(shards, 700, layers=4, staging=staging)
    for turn in range(10):
        caches, ids, staged = cases.make_inputs(case, seed + turn, gpu)
        want = [x.clone() for x in caches]
        sources = tuple(want) if staged is None else tuple(staged)
        call = merge.MergeCall(tuple(want), sources, tuple(ids), shards)
        if staged is None:
            call = replace(call, sources=call.caches)
        merge_reference.run(call)
        kv_layout.merge_head_shards_(caches, ids, shards, staging=staged)
        for got, expected in zip(caches, want, strict=True):
            assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_all_layers_are_one_launch(gpu, monkeypatch, seed):
    launches = []
    launch = merge_triton.launch

    def counted(*given, **options):
        launches.append(given)
        launch(*given, **options)

    monkeypatch.setattr(merge_triton, "launch", counted)
    caches, ids, _ = cases.make_inputs(cases.MergeCase((4, 4), layers=48), seed, gpu)
    kv_layout.merge_head_shards_(caches, ids, 2)
    assert len(launches) == 1


def test_caches_far_apart_and_past_two_gigabytes(gpu, seed):
    """Block numbers times their size outgrow int32."""
    case = cases.MergeCase((4, 4), 3, layers=1)
    caches, _, _ = cases.make_inputs(case, seed, gpu, num_blocks=20000)
    ids = [19999, 0, 12345]
    want = [x[ids].clone() for x in caches]
    kv_layout.merge_head_shards_(caches, ids, case.shards)
    for cache, blocks in zip(caches, want, strict=True):
        expected = merge_reference.merged(blocks, case.shards)
        assert torch.equal(cache[ids].view(torch.int16), expected.view(torch.int16))


def test_a_stream_of_its_own(gpu, seed):
    """Launched on the current stream: what was queued there before has landed."""
    stream = torch.cuda.Stream()
    caches, ids, _ = cases.make_inputs(cases.MergeCase((2, 2), layers=2), seed, gpu)
    fresh, _, _ = cases.make_inputs(cases.MergeCase((2, 2), layers=2), seed + 1, gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for cache, other in zip(caches, fresh, strict=True):
            cache.copy_(other)
        kv_layout.merge_head_shards_(caches, ids, 2)
    stream.synchronize()
    for cache, other in zip(caches, fresh, strict=True):
        want = merge_reference.merged(other[ids], (2, 2))
        assert torch.equal(cache[ids].view(torch.int16), want.view(torch.int16))


def test_what_the_kernel_leaves_to_the_reference(seed):
    caches, ids, _ = cases.make_inputs(cases.MergeCase((1,) * 16, block_size=512, width=8), seed)
    call = merge.MergeCall(tuple(caches), tuple(caches), tuple(ids), (1,) * 16)
    assert merge_triton.supports(call) == (
        False,
        "a block must have 4096 rows at most: tokens times shards",
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", ALL, ids=str)
def test_it_compiles_for_a_gpu_without_one(case):
    """For an H100: sixteen bytes at a time, and a barrier between the last load and a store."""
    import kv_compiled

    found = kv_compiled.for_gpu(case)
    print(found)
    assert found["apart"], "a row is written before all are read"
    assert found["spilled"] == 0
    assert found["registers"] <= 128
    assert found["loads"] == found["stores"]
    if case.dtype == "bfloat16":
        assert found["stores"] == {"v2.b64"}
