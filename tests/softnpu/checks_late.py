"""Checks of late mode, which run on it: with a wait the new value, without it the old one.

`OFF` says that late mode is off; then every check of a missing wait has to see the new value.
"""

from __future__ import annotations

import os

import torch
import torch_npu  # noqa: F401
from softnpu_checks import check, main

npu = torch.npu
MODE = os.environ.get("SOFTNPU_LATE", "0")
OFF = MODE == "0"
OLD, NEW = [0, 0, 0], [1, 2, 3]


def unordered(found: list[int], late: bool = True) -> None:
    """Without a wait: the old value wherever the stream that writes is late."""
    assert found == (OLD if late and not OFF else NEW), found


def device() -> torch.Tensor:
    made = torch.tensor(NEW, device="npu")
    npu.synchronize()
    return made


def pinned(value: int = 0) -> torch.Tensor:
    return torch.full((3,), value, dtype=torch.int64).pin_memory()


MAIN_IS_LATE = MODE in ("all", "default")
SIDE_IS_LATE = MODE in ("all", "side")


@check
def to_the_host_without_a_wait():
    for _ in range(3):
        host = pinned()
        host.copy_(device(), non_blocking=True)
        unordered(host.tolist(), MAIN_IS_LATE)
        npu.synchronize()
        assert host.tolist() == NEW


@check
def to_the_host_with_each_kind_of_wait():
    def by_event():
        event = npu.Event()
        event.record()
        event.synchronize()

    def by_query():
        event = npu.Event()
        event.record()
        turns = 0
        while not event.query():
            turns += 1
        assert (turns > 0) == MAIN_IS_LATE, turns

    def by_stream_query():
        while not npu.current_stream().query():
            pass

    for wait in (
        npu.synchronize, npu.current_stream().synchronize, by_event, by_query, by_stream_query,
        lambda: torch.ones(3, device="npu").sum().item(),
        lambda: torch.ones(3, device="npu").nonzero(),
    ):  # fmt: skip
        source, host = device(), pinned()
        host.copy_(source, non_blocking=True)
        wait()
        assert host.tolist() == NEW, wait


@check
def to_the_host_after_an_event_that_was_recorded_too_early():
    source, host, event = device(), pinned(), npu.Event()
    event.record()
    host.copy_(source, non_blocking=True)
    event.synchronize()
    unordered(host.tolist(), MAIN_IS_LATE)
    npu.synchronize()


@check
def copies_that_wait_by_themselves():
    source = device()
    host = pinned()
    host.copy_(source)
    assert host.tolist() == NEW
    pageable = torch.zeros(3, dtype=torch.int64)
    pageable.copy_(source, non_blocking=True)
    assert pageable.tolist() == NEW
    assert (source + 1 - 1).cpu().tolist() == NEW
    asked = source.to("cpu", non_blocking=True)
    npu.synchronize()
    assert asked.tolist() == NEW
    doubles = torch.zeros(3, dtype=torch.float64)
    doubles.copy_(source, non_blocking=True)
    assert doubles.tolist() == NEW
    strided = torch.zeros(3, 2, dtype=torch.int64)
    strided[:, 1].copy_(source)
    assert strided[:, 1].tolist() == NEW


@check
def a_copy_to_the_host_has_the_value_of_its_place_in_the_stream():
    source, host = device().clone(), pinned()
    host.copy_(source, non_blocking=True)
    source.zero_()
    npu.synchronize()
    assert host.tolist() == NEW


def _staged(wait: bool) -> tuple[list[int], list[int]]:
    host, target = pinned(), torch.empty(3, dtype=torch.int64, device="npu")
    host[:] = torch.tensor(NEW)
    target.copy_(host, non_blocking=True)
    result = target * 10
    if wait:
        npu.current_stream().synchronize()
    host[:] = 7
    return target.cpu().tolist(), result.cpu().tolist()


@check
def a_staging_buffer_that_is_written_again_too_early():
    for _ in range(3):
        expected = ([7] * 3, [70] * 3) if MAIN_IS_LATE else (NEW, [10, 20, 30])
        assert _staged(wait=False) == expected


@check
def a_staging_buffer_that_is_written_again_after_a_wait():
    assert _staged(wait=True) == (NEW, [10, 20, 30])


@check
def pinned_memory_lives_until_its_copy_has_run():
    host, target = pinned(5), torch.empty(3, dtype=torch.int64, device="npu")
    target.copy_(host, non_blocking=True)
    del host
    pinned(9)
    assert target.cpu().tolist() == [5] * 3


@check
def pinned_memory_between_two_copies_of_a_stream_needs_no_wait():
    source, host = device(), pinned()
    host.copy_(source, non_blocking=True)
    target = torch.empty(3, dtype=torch.int64, device="npu")
    target.copy_(host, non_blocking=True)
    unordered(host.tolist(), MAIN_IS_LATE)
    assert target.cpu().tolist() == NEW


def _two_streams(side_writes: bool, wait: bool) -> list[int]:
    source, side = device(), npu.Stream()
    shared = torch.zeros(3, dtype=torch.int64, device="npu")
    npu.synchronize()
    writer, reader = (side, npu.current_stream()) if side_writes else (npu.current_stream(), side)
    with npu.stream(writer):
        shared.copy_(source)
    if wait:
        reader.wait_stream(writer)
    with npu.stream(reader):
        found = (shared * 1).cpu().tolist()  # waits for the reader alone
    npu.synchronize()
    return found


@check
def two_streams_without_a_wait():
    for _ in range(3):
        unordered(_two_streams(side_writes=True, wait=False), SIDE_IS_LATE)
        unordered(_two_streams(side_writes=False, wait=False), MAIN_IS_LATE)


@check
def two_streams_with_a_wait():
    for side_writes in (True, False):
        assert _two_streams(side_writes, wait=True) == NEW


def _output_on_a_side_stream(factor: int, wait: bool) -> list[int]:
    """As vLLM's asynchronous scheduling brings tokens to the host."""
    side, host, event = npu.Stream(), pinned(), npu.Event()
    result = torch.zeros(3, dtype=torch.int64, device="npu")
    npu.synchronize()
    torch.mul(torch.tensor(NEW, device="npu"), factor, out=result)
    with npu.stream(side):
        if wait:
            side.wait_stream(npu.default_stream())
        host.copy_(result, non_blocking=True)
        event.record()
    event.synchronize()
    found = host.tolist()
    npu.synchronize()
    return found


@check
def output_on_a_side_stream():
    assert _output_on_a_side_stream(2, wait=True) == [2, 4, 6]
    assert _output_on_a_side_stream(2, wait=False) == (OLD if MAIN_IS_LATE else [2, 4, 6])


@check
def operators_give_what_they_give_on_the_cpu():
    """Views, in place, out=, resize, lists, reductions, sorting, indices, numbers; all at once."""
    generator = torch.Generator().manual_seed(torch.seed())
    start = torch.randn(6, 8, generator=generator)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        d = x.device
        kept = [x.t().contiguous(), x.reshape(48)[3:7].clone(), x.view(2, 24).sum(1)]
        x = x.clone()
        x[2:4] = 7
        x.t()[1].add_(3)
        x[torch.tensor([0, 1], device=d), torch.tensor([2, 3], device=d)] = 9
        x[x > 1] = 0.5
        x.index_add_(0, torch.tensor([0, 0, 5], device=d), torch.ones_like(x[:3]))
        out = torch.empty(0, device=d)
        torch.add(x, x.t().t(), out=out)
        values, order = torch.sort(x, dim=1)
        top = torch.topk(x, 3)
        kept += [x, out, values, order, top.values, top.indices, x[x > 0.4], x.argmax(-1)]
        kept += [torch.cat([x, out]), *torch.split(x, 4), torch.where(x > 0, x, 2.0), x.softmax(-1)]
        kept += [torch.nn.functional.layer_norm(x, (8,)), x @ x.t(), x.to(torch.bfloat16) * 2]
        kept += [torch.arange(5, device=d), torch.cumsum(x, 0), x.expand(2, 6, 8) + x, x.float()]
        kept += torch._foreach_add([x, out], 1)
        return kept

    expected = run(start)
    found = run(start.to("npu"))
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape, index
        assert one.stride() == other.stride(), index
        assert torch.equal(one.cpu(), other), (index, one.cpu(), other)


@check
def a_graph_replays_late():
    x, host = torch.ones(3, device="npu"), torch.zeros(3).pin_memory()
    graph = npu.NPUGraph()
    npu.synchronize()
    with npu.graph(graph):
        y = x + 1
    y.zero_()
    npu.synchronize()
    for value in (3, 5):
        x.fill_(value)
        graph.replay()
        host.copy_(y, non_blocking=True)
        before = host.tolist()
        npu.current_stream().synchronize()
        assert host.tolist() == [value + 1.0] * 3
        assert before == ([{3: 0.0, 5: 4.0}[value]] * 3 if MAIN_IS_LATE else host.tolist()), before


@check
def an_operator_that_fails_is_the_error_of_the_next_wait():
    table = torch.ones(4, 2, device="npu")
    try:
        torch.nn.functional.embedding(torch.tensor([9], device="npu"), table)
        npu.synchronize()
    except (RuntimeError, IndexError):
        pass
    else:
        raise AssertionError("an index outside of its table was no error")
    npu.synchronize()
    assert (table + 1).tolist() == [[2.0, 2.0]] * 4


if __name__ == "__main__":
    main()
