"""One rank of the tests of HCCL: hccl_ranks.py CASE RANK RANKS PORT SEED; runs on the software NPU.

Prints JSON in its last line.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def drawn(seed: int, rank: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank has, which every rank can compute; small whole numbers, exact in any dtype."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def equal(npu: torch.Tensor, cpu: torch.Tensor) -> None:
    assert npu.device.type == "npu"
    assert torch.equal(npu.cpu(), cpu.to(npu.dtype)), (npu.cpu(), cpu)


def collectives(rank: int, ranks: int, seed: int) -> None:
    npu = f"npu:{rank}"
    everybody = range(ranks)
    for dtype in (*FLOATS, torch.int64, torch.int32, torch.int8):
        # The second is longer than a slot of the shared file, and no multiple of it.
        for count in (1, 1_300_001) if dtype in (torch.bfloat16, torch.int32) else (5,):
            all_ = [drawn(seed, r, count, dtype=dtype) for r in everybody]
            mine = all_[rank].to(npu)
            stacked = torch.stack(all_).double()
            for op, right in (
                (dist.ReduceOp.SUM, stacked.sum(0)),
                (dist.ReduceOp.MAX, stacked.amax(0)),
                (dist.ReduceOp.MIN, stacked.amin(0)),
                (dist.ReduceOp.PRODUCT, stacked.prod(0)),
            ):
                x = mine.clone()
                dist.all_reduce(x, op)
                equal(x, right)
            x = mine.clone()
            dist.broadcast(x, 1)
            equal(x, all_[1])
            flat = torch.empty(ranks * count, dtype=dtype, device=npu)
            dist.all_gather_into_tensor(flat, mine)
            equal(flat, torch.cat(all_))
            x = mine.clone()
            dist.reduce(x, 0)
            equal(x, stacked.sum(0) if rank == 0 else all_[rank])
    parts = [drawn(seed + 1, r, ranks, 70_001, dtype=torch.float32) for r in everybody]
    x = torch.empty(70_001, device=npu)
    dist.reduce_scatter_tensor(x, parts[rank].flatten().to(npu))
    equal(x, torch.stack(parts).sum(0)[rank])
    x = torch.empty(ranks * 70_001, device=npu)
    dist.all_to_all_single(x, parts[rank].flatten().to(npu))
    equal(x, torch.cat([part[rank] for part in parts]))
    # Uneven: rank s sends s + r + 1 rows to rank r.
    rows = [drawn(seed + 2, s, sum(s + r + 1 for r in everybody), 5, dtype=torch.float32)
            for s in everybody]  # fmt: skip
    sizes = [[s + r + 1 for r in everybody] for s in everybody]
    x = torch.empty(sum(sizes[s][rank] for s in everybody), 5, device=npu)
    dist.all_to_all_single(x, rows[rank].to(npu), [sizes[s][rank] for s in everybody], sizes[rank])
    equal(x, torch.cat([rows[s].split(sizes[s])[rank] for s in everybody]))
    dist.barrier()


def messages(rank: int, ranks: int, seed: int) -> None:
    npu = f"npu:{rank}"
    other = 1 - rank
    for count in (1, 700_001):
        mine, theirs = (drawn(seed, r, count, dtype=torch.float32) for r in (rank, other))
        x = torch.empty(count, device=npu)
        if rank == 0:
            dist.send(mine.to(npu), 1)
            dist.recv(x, 1)
        else:
            dist.recv(x, 0)
            dist.send(mine.to(npu), 0)
        equal(x, theirs)
        # Both at once, as a ring would.
        x = torch.empty(count, device=npu)
        work = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine.to(npu), other), dist.P2POp(dist.irecv, x, other)]
        )
        for one in work:
            one.wait()
        equal(x, theirs)


def groups(rank: int, ranks: int, seed: int) -> None:
    npu = f"npu:{rank}"
    both, alone = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(ranks)][rank]
    x = torch.full((3,), float(rank + 1), device=npu)
    dist.all_reduce(x, group=both)
    dist.all_reduce(x, group=alone)
    assert x.tolist() == [3, 3, 3]


def captured(rank: int, ranks: int, seed: int) -> None:
    """A collective in a graph is done again in each replay."""
    npu = f"npu:{rank}"
    x, graph = torch.zeros(4, device=npu), torch.npu.NPUGraph()
    dist.all_reduce(x)
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y = x * 2
        dist.all_reduce(y)
    for value in (1.0, 5.0):
        x.fill_(value + rank)
        graph.replay()
        torch.npu.synchronize()
        assert y.tolist() == [2 * (2 * value + 1)] * 4, y


def list_of_tensors(rank: int, ranks: int, seed: int) -> str:
    """torch_npu pads for all_gather into a list, with an operator past PyTorch's dispatcher."""
    x = torch.ones(5, device=f"npu:{rank}")
    try:
        dist.all_gather([torch.empty_like(x) for _ in range(ranks)], x)
    except RuntimeError as error:
        return f"refused: {error}"
    return "gathered"


def disagreement(rank: int, ranks: int, seed: int) -> str:
    """Ranks that reduce tensors of two lengths get an error, and no sum."""
    x = torch.ones(4 + rank, device=f"npu:{rank}")
    try:
        dist.all_reduce(x)
        torch.npu.synchronize()
    except RuntimeError as error:
        return f"refused: {error}"
    return f"summed {x.tolist()}"


def refusals(rank: int, ranks: int, seed: int) -> list[str]:
    return [list_of_tensors(rank, ranks, seed), disagreement(rank, ranks, seed)]


def death(rank: int, ranks: int, seed: int) -> str:
    """A rank ends in the middle; the other one's collective ends with an error, soon."""
    x = torch.ones(4, device=f"npu:{rank}")
    dist.all_reduce(x)
    torch.npu.synchronize()
    if rank == 1:
        os._exit(9)
    began = time.monotonic()
    try:
        dist.all_reduce(x)
        torch.npu.synchronize()
    except RuntimeError:
        print(json.dumps(["ended", time.monotonic() - began]), flush=True)
        os._exit(0)
    return f"summed {x.tolist()}"


def right(rank: int, ranks: int, seed: int) -> str:
    """Everything that works, in one start of the processes."""
    for case in (collectives, messages, groups, captured):
        case(rank, ranks, seed)
    return "right"


CASES = {f.__name__: f for f in (right, refusals, death)}


def main() -> None:
    case, (rank, ranks, port, seed) = sys.argv[1], map(int, sys.argv[2:])
    torch.npu.set_device(rank)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("hccl", init_method=where, rank=rank, world_size=ranks)
    print(json.dumps(["returned", CASES[case](rank, ranks, seed)]), flush=True)
    # No farewell: what is checked has been, and a rank that failed would wait for the other.
    os._exit(0)


if __name__ == "__main__":
    main()
