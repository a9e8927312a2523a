"""HCCL of the software NPU: ranks in processes of their own, through torch.distributed."""

from __future__ import annotations

import json
import subprocess
import time

from _server import free_port
from softnpu_environment import HERE, Environment

SECONDS = 180


def ranks(npu: Environment, case: str, seed: int, count: int = 2) -> list[tuple[int, list, str]]:
    """Run a case in that many processes; for each its exit code, JSON and stderr."""
    port = free_port()
    running = [
        subprocess.Popen(
            [str(npu.python), str(HERE / "hccl_ranks.py"), case, str(rank), str(count),
             str(port), str(seed)],
            env=npu.variables(devices=count), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    found = []
    try:
        deadline = time.monotonic() + SECONDS
        for one in running:
            out, err = one.communicate(timeout=max(1, deadline - time.monotonic()))
            lines = [line for line in out.splitlines() if line.startswith('["')]
            found.append((one.returncode, json.loads(lines[-1]) if lines else [], err))
    finally:
        for one in running:
            one.kill()
    return found


def test_ranks_get_what_they_should(npu, seed):
    """Collectives, messages, groups, and a collective in a graph; what each rank has is exact."""
    for code, said, err in ranks(npu, "right", seed):
        assert (code, said) == (0, ["returned", "right"]), err[-3000:]


def test_ranks_that_disagree_get_an_error(npu, seed):
    for code, said, err in ranks(npu, "disagreement", seed):
        assert code == 0, err[-3000:]
        assert said[1].startswith("refused"), said
        assert "ranks disagree" in err


def test_a_dead_rank_ends_the_others_wait(npu, seed):
    first, second = ranks(npu, "death", seed)
    assert second[0] == 9
    assert first[0] == 0, first[2][-3000:]
    ended, seconds = first[1]
    assert ended == "ended"
    # HCCL_EXEC_TIMEOUT would be 600; a busy machine gets some of them.
    assert seconds < 20
    assert "rank 1 has ended" in first[2]


def test_an_operator_past_the_dispatcher_is_refused_by_name(npu, seed):
    """A known limit: a stub in place of it returned garbage before."""
    for code, said, err in ranks(npu, "list_of_tensors", seed):
        assert code == 0, err[-3000:]
        assert said[1].startswith("refused: software NPU: aclCreateTensorDesc"), said
