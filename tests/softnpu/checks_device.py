"""Checks of the device itself: memory, tensors, streams, events, generators, graphs; runs on it."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading
import time

import torch
import torch_npu
from softnpu_checks import check, main

NPU = torch.device("npu:0")


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random tensor on both sides."""
    cpu = torch.randn(*shape).to(dtype)
    return cpu, cpu.to(NPU)


def same(npu: torch.Tensor, cpu: torch.Tensor) -> None:
    assert npu.device.type == "npu", npu.device
    assert npu.dtype == cpu.dtype, (npu.dtype, cpu.dtype)
    assert npu.shape == cpu.shape, (npu.shape, cpu.shape)
    assert torch.equal(npu.cpu(), cpu), (npu.cpu(), cpu)


@check
def devices_and_names():
    assert torch.npu.is_available()
    assert torch.npu.device_count() == int(os.environ["SOFTNPU_DEVICES"])
    assert torch.npu.get_device_name() == "Ascend910B3"
    found = torch.npu.get_device_properties(0)
    assert (found.cube_core_num, found.vector_core_num) == (20, 40)


@check
def two_devices_have_memory_of_their_own():
    one, other = torch.ones(4, device="npu:0"), torch.zeros(4, device="npu:1")
    assert (one.get_device(), other.get_device()) == (0, 1)
    before = [torch.npu.memory_allocated(i) for i in range(2)]
    big = torch.empty(1 << 20, device="npu:1")
    after = [torch.npu.memory_allocated(i) for i in range(2)]
    # An allocation is rounded up to 512 bytes, behind 32 of padding.
    assert after[0] == before[0]
    assert 0 <= after[1] - before[1] - big.numel() * 4 <= 1024
    other.copy_(one)
    assert other.tolist() == [1, 1, 1, 1]
    with torch.npu.device(1):
        assert torch.npu.current_device() == 1
        assert torch.empty(1, device="npu").get_device() == 1
    assert torch.npu.current_device() == 0
    try:
        one + other
    except RuntimeError:
        pass
    else:
        raise AssertionError("tensors of two devices were added")


@check
def views_share_memory():
    cpu, npu = pair(6, 8)
    for view in (
        lambda x: x[1:4, ::2], lambda x: x.t(), lambda x: x.view(2, 24), lambda x: x[2],
        lambda x: x.unfold(1, 3, 2), lambda x: x.expand(3, 6, 8)[1], lambda x: x.diagonal(),
        lambda x: x.narrow(0, 2, 3).flatten(), lambda x: x.view(torch.int32),
        lambda x: x.split(3)[1], lambda x: x.chunk(2, 1)[1], lambda x: x.unbind(1)[7],
        lambda x: x.squeeze(), lambda x: x.unsqueeze(1), lambda x: x.movedim(0, 1),
        lambda x: x.as_strided((3, 2), (8, 1), 5), lambda x: x.reshape(48)[3:],
    ):  # fmt: skip
        same(view(npu), view(cpu))
        assert view(npu).untyped_storage().data_ptr() == npu.untyped_storage().data_ptr()
        changed = [x.clone() for x in (cpu, npu)]
        for x in changed:
            view(x).fill_(7)
        same(changed[1], changed[0])
        assert not torch.equal(changed[0], cpu)


@check
def in_place_and_indexed_writes():
    cpu, npu = pair(6, 8)
    for x in (cpu, npu):
        x[2:4] = 7
        x.t()[1].add_(3)
        x[torch.tensor([0, 1], device=x.device), torch.tensor([2, 3], device=x.device)] = 9
        x[x > 1] = 0.5
        x.mul_(2).clamp_(-1, 1)
        x[:, 0].copy_(torch.arange(6.0))
        x.index_add_(0, torch.tensor([0, 0, 5], device=x.device), torch.ones_like(x[:3]))
        x.scatter_(1, torch.zeros(6, 1, dtype=torch.long, device=x.device), 4.0)
    same(npu, cpu)
    for x in (cpu, npu):
        x.t_()
        x.unsqueeze_(0)
        x.squeeze_()
    same(npu, cpu)


@check
def results_into_given_tensors():
    cpu, npu = pair(6, 8)
    outs = [torch.empty(0), torch.empty(0, device=NPU)]
    torch.add(cpu, cpu, out=outs[0])
    torch.add(npu, npu, out=outs[1])
    same(outs[1], outs[0])
    buffers = [torch.zeros(10, 8), torch.zeros(10, 8, device=NPU)]
    torch.mul(cpu, 2, out=buffers[0][:6])
    torch.mul(npu, 2, out=buffers[1][:6])
    same(buffers[1], buffers[0])
    strided = [torch.zeros(8, 6).t(), torch.zeros(8, 6, device=NPU).t()]
    torch.mul(cpu, 3, out=strided[0])
    torch.mul(npu, 3, out=strided[1])
    same(strided[1], strided[0])
    values, indices = torch.empty(0, device=NPU), torch.empty(0, dtype=torch.long, device=NPU)
    torch.sort(npu, out=(values, indices))
    same(values, cpu.sort().values)


@check
def lists_and_resizes():
    cpu, npu = pair(3, 4)
    same(torch.cat([npu, npu[:1]]), torch.cat([cpu, cpu[:1]]))
    same(torch.stack(npu.unbind()), cpu)
    ones = [[x.clone(), x.clone()] for x in (cpu, npu)]
    for many in ones:
        torch._foreach_add_(many, 1.0)
    same(ones[1][1], ones[0][1])
    grown = npu.clone().resize_(5, 4)
    same(grown[:3], cpu)
    npu.set_(grown.untyped_storage(), 4, (2, 4), (4, 1))
    same(npu, cpu[1:])


@check
def dtypes_and_python_numbers():
    for dtype in (
        torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16,
        torch.int32, torch.int64, torch.bool,
    ):  # fmt: skip
        cpu = torch.tensor([0, 1, 2, 3]).to(dtype)
        npu = cpu.to(NPU)
        same(npu, cpu)
        same(npu + 1, cpu + 1)
        same(npu * 2.5, cpu * 2.5)
        same(npu.float(), cpu.float())
        assert (npu.tolist(), npu[1].item()) == (cpu.tolist(), cpu[1].item())
    # A number takes part in type promotion as a number.
    assert (torch.ones(2, dtype=torch.bfloat16, device=NPU) * torch.tensor(2.0)).dtype == (
        torch.bfloat16
    )


@check
def copies_between_host_and_device():
    pinned = torch.randn(1000).pin_memory()
    assert (pinned.is_pinned(), torch.randn(3).is_pinned()) == (True, False)
    there = pinned.to(NPU, non_blocking=True)
    back = torch.empty(1000).pin_memory()
    back.copy_(there, non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(back, pinned)
    same(pinned.view(10, 100).t().to(NPU), pinned.view(10, 100).t())
    same(there.to(torch.float16).view(10, 100)[:, ::3].contiguous(),
         pinned.half().view(10, 100)[:, ::3].contiguous())  # fmt: skip
    host = torch.zeros(10, 3)
    host[:, 1] = there[:10]
    assert torch.equal(host[:, 1], pinned[:10])


@check
def streams_and_events():
    side = torch.npu.Stream()
    assert torch.npu.current_stream() != side
    first, last = (torch.npu.Event(enable_timing=True) for _ in range(2))
    first.record()
    with torch.npu.stream(side):
        assert torch.npu.current_stream() == side
        x = torch.ones(3, device=NPU) * 2
        last.record(side)
    torch.npu.current_stream().wait_event(last)
    torch.npu.current_stream().wait_stream(side)
    x.record_stream(torch.npu.current_stream())
    last.synchronize()
    assert (last.query(), side.query()) == (True, True)
    assert 0 <= first.elapsed_time(last) < 60_000
    assert x.tolist() == [2, 2, 2]


@check
def another_thread_uses_the_device():
    found = []

    def work() -> None:
        torch.npu.set_device(1)
        with torch.npu.stream(torch.npu.Stream()):
            found.append((torch.ones(5, device="npu") + 1).sum().item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == [10]


@check
def generators_repeat_and_restore():
    generator = torch.Generator(device=NPU)
    generator.manual_seed(5)
    first = torch.randn(3, device=NPU, generator=generator)
    second = torch.randn(3, device=NPU, generator=generator)
    assert not torch.equal(first.cpu(), second.cpu())
    generator.manual_seed(5)
    same(torch.randn(3, device=NPU, generator=generator), first.cpu())
    state = generator.get_state()
    same(torch.randn(3, device=NPU, generator=generator), second.cpu())
    third = torch.randn(3, device=NPU, generator=generator)
    generator.set_state(state)
    same(torch.randn(3, device=NPU, generator=generator), second.cpu())
    same(torch.randn(3, device=NPU, generator=generator), third.cpu())
    torch.npu.manual_seed_all(3)
    one = torch.rand(4, device=NPU)
    torch.npu.manual_seed_all(3)
    same(torch.rand(4, device=NPU), one.cpu())
    saved = torch.npu.get_rng_state()
    two = torch.rand(4, device=NPU)
    torch.npu.set_rng_state(saved)
    same(torch.rand(4, device=NPU), two.cpu())
    drawn = torch.empty(20_000, device=NPU).exponential_().mean().item()
    assert 0.95 < drawn < 1.05, drawn


@check
def saved_and_loaded():
    cpu, npu = pair(3, 4, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save({"x": npu, "row": npu[1]}, file)
    file.seek(0)
    loaded = torch.load(file)
    same(loaded["x"], cpu)
    loaded["x"].zero_()
    assert loaded["row"].tolist() == [0, 0, 0, 0]
    same(copy.deepcopy(npu), cpu)
    file.seek(0)
    assert torch.load(file, map_location="cpu")["x"].device.type == "cpu"


@check
def gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.GELU(),
        torch.nn.LayerNorm(64), torch.nn.Linear(64, 16), torch.nn.Softmax(-1),
    )  # fmt: skip
    ids = torch.randint(0, 50, (4, 7))
    model(ids).log().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    there = copy.deepcopy(model).to(NPU)
    there(ids.to(NPU)).log().sum().backward()
    for found, right in zip(there.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.grad.cpu(), right, rtol=1e-5, atol=1e-6)


@check
def attention_of_pytorch():
    q, k, v = (torch.randn(1, 4, 9, 16) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    for more in ({}, {"is_causal": True}, {"attn_mask": torch.ones(9, 9).tril().bool()}):
        there = {n: m.to(NPU) if isinstance(m, torch.Tensor) else m for n, m in more.items()}
        found = attend(q.to(NPU), k.to(NPU), v.to(NPU), **there)
        torch.testing.assert_close(found.cpu(), attend(q, k, v, **more), rtol=1e-5, atol=1e-5)


@check
def memory_is_accounted_and_given_back():
    gc.collect()
    torch.npu.empty_cache()
    before = torch.npu.mem_get_info()
    assert before[1] == int(os.environ["SOFTNPU_MEMORY_GB"]) << 30
    allocated = torch.npu.memory_allocated()
    big = torch.ones(64 << 20, dtype=torch.uint8, device=NPU)
    assert 0 <= torch.npu.memory_allocated() - allocated - (64 << 20) <= 1024
    assert before[0] - torch.npu.mem_get_info()[0] >= 64 << 20
    assert torch.npu.max_memory_allocated() >= 64 << 20
    del big
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == before[0]
    try:
        torch.empty(before[1] + 1, dtype=torch.uint8, device=NPU)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("more memory than the device has was allocated")
    assert torch.ones(3, device=NPU).sum().item() == 3


@check
def graph_is_captured_and_replayed():
    x, weight = torch.zeros(4, device=NPU), torch.ones(4, 4, device=NPU)
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y = (x @ weight).relu() + 1
        z = torch.cat([y, x])
        z.mul_(2)
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        graph.replay()
        torch.npu.synchronize()
        assert y.tolist() == [4 * value + 1] * 4
        assert z.tolist() == [8 * value + 2] * 4 + [2 * value] * 4
    # What is asked for before the replay has to see the memory as it was.
    x.fill_(5.0)
    kept = y.clone()
    graph.replay()
    assert (kept.tolist(), y.tolist()) == ([13.0] * 4, [21.0] * 4)


@check
def graph_waits_for_the_update_of_its_task_groups():
    """The host asks for a replay and updates it afterwards; another thread wants its results."""
    x, y = torch.ones(4, device=NPU), torch.zeros(4, device=NPU)
    graph, update = torch.npu.NPUGraph(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(stream)
        torch.add(x, 5, out=y)
        handle = torch.npu.graph_task_group_end(stream)
        z = y * 2
    for added in (7, 9):
        graph.replay()
        found = []
        other = threading.Thread(target=lambda found=found: found.append(z.cpu().tolist()))
        other.start()
        time.sleep(0.3)
        with torch.npu.stream(update):
            torch.npu.graph_task_update_begin(update, handle)
            torch.add(x, added, out=y)
            torch.npu.graph_task_update_end(update)
        other.join(60)
        assert found == [[2.0 * (1 + added)] * 4], found


@check
def graph_random_numbers_differ_from_replay_to_replay():
    graph = torch.npu.NPUGraph()
    x = torch.zeros(100, device=NPU)
    with torch.npu.graph(graph):
        x.uniform_()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(x.cpu())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@check
def unknown_computations_are_refused_by_name():
    x = torch.randn(4, 4, device=NPU)
    for name, call in (
        ("npu::npu_ciou", lambda: torch_npu.npu_ciou(x, x, True)),
        ("npu::npu_deep_norm", lambda: torch_npu.npu_deep_norm(x, x, x[0], x[0])),
    ):
        message = ""
        try:
            call()
        except NotImplementedError as error:
            message = str(error)
        assert name in message, message or "it returned something"


if __name__ == "__main__":
    main()
