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


def test_what_cannot_be_right_is_an_error(npu, seed):
    """Ranks that disagree; and an operator past PyTorch's dispatcher, which a stub would fake."""
    for code, (_, said), err in ranks(npu, "refusals", seed):
        assert code == 0, err[-3000:]
        listed, disagreed = said
        assert listed.startswith("refused: software NPU: aclCreateTensorDesc"), listed
        assert disagreed.startswith("refused"), disagreed
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
