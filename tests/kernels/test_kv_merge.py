"""merge_head_shards_: the torch reference, what it refuses, and the Triton kernel interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
np = pytest.importorskip("numpy", reason="numpy is not installed")

import kv_judge  # noqa: E402

from ascend_patch.kernels import dispatch, kv_layout  # noqa: E402
from ascend_patch.kernels.kv_layout import cases, merge, merge_reference, merge_tiles  # noqa: E402

HERE = Path(__file__).resolve().parent
ALL = (*cases.CASES, *cases.UNEVEN)
CASE = cases.MergeCase((2, 2), block_size=4, width=8)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_byte_is_where_it_belongs(case, seed):
    with dispatch.only("reference"):
        assert kv_judge.wrong_bytes(case, seed) == 0


def test_a_long_request_is_done_in_parts(seed, monkeypatch):
    monkeypatch.setattr(merge_reference, "MOST_BYTES", 1 << 16)
    assert kv_judge.wrong_bytes(replace(CASE, blocks=50, block_size=64), seed) == 0


def test_the_judge_sees_heads_that_are_swapped(seed):
    def swapped(caches, ids, shards, **options):
        kv_layout.merge_head_shards_(caches, ids, shards, **options)
        for cache in caches:
            cache[ids[0]] = cache[ids[0]].flip(1)

    assert kv_judge.wrong_bytes(CASE, seed, run=swapped) > 0


def test_the_judge_sees_a_block_that_was_not_named(seed):
    def more(caches, ids, shards, **options):
        others = sorted(set(range(caches[0].shape[0])) - set(ids))
        kv_layout.merge_head_shards_(caches, [*ids, others[0]], shards, **options)

    assert kv_judge.wrong_bytes(CASE, seed, run=more) > 0


def interpreted(seed: int, *options: str) -> dict[str, dict[str, int]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "kv_interpreted.py"), str(seed), *options]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_interpreted_kernel_moves_every_byte(seed):
    found = interpreted(seed)
    assert len(found["gpu"]) == len(ALL)
    assert len(found["ascend"]) == len(cases.CASES)
    assert {n for form in found.values() for n in form.values()} == {0}, found


def test_programs_that_get_into_each_others_way_are_seen(seed):
    """Rows taken as they come, not in whole cycles: one program overwrites what another reads."""
    found = interpreted(seed, "open")["gpu"]
    wrong = {case for case, count in found.items() if count}
    assert {str(case) for case in cases.CASES[1:4]} <= wrong
    assert not any("staging" in case for case in wrong)


@pytest.mark.parametrize("shards", [(1, 1), (4, 4), (2,) * 4, (1,) * 8, (2, 1), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 20, 128])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_groups_of_rows_are_closed(shards, block_size, rows):
    """What a program writes is what it read: the same rows; and no row is in two programs."""
    source, target = merge_tiles.row_groups(block_size, shards, rows, True)
    for read, written in zip(source, target, strict=True):
        assert sorted(read[read >= 0]) == sorted(written[written >= 0])
    moved = source[source >= 0]
    assert len(set(moved)) == len(moved)
    whole = merge_tiles.permutation(block_size, shards)
    assert sorted(whole) == list(range(len(whole)))
    assert set(moved) == set(np.flatnonzero(whole != np.arange(len(whole))))
    assert (target[source >= 0] == whole[moved]).all()


@pytest.mark.parametrize("shards", [(4, 4), (2,) * 4, (1,) * 8], ids=str)
def test_groups_waste_few_lanes(shards):
    """Of the benchmark's shapes: a mask hides at most an eighth of what programs hold."""
    row = 128 * shards[0] * 2 // 8
    tiles, table = merge_tiles.cuda_tiles(128, shards, row, 8, True)
    assert (table[0] >= 0).mean() > 0.87
    assert tiles.columns == row
    assert tiles.chunks == 1


def made(**changes):
    return cases.make_inputs(replace(CASE, **changes), 0)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_nothing_to_merge_is_nothing_launched(layout, seed):
    caches, ids, _ = made()
    before = [x.clone() for x in caches]
    seen: list[str] = []
    previous = dispatch.set_observer(seen.append)
    try:
        kv_layout.merge_head_shards_(caches, ids, 2 if layout == "HND" else 1, layout=layout)
        kv_layout.merge_head_shards_(caches, [], 2)
        kv_layout.merge_head_shards_([], [], 2)
        assert seen == []
        kv_layout.merge_head_shards_(caches, ids, 2)
        assert seen == ["merge_head_shards_"]
    finally:
        dispatch.set_observer(previous)
    assert not torch.equal(bits(caches[0]), bits(before[0]))


def bits(x):
    return x.view(torch.int16)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_staging_without_a_merge_is_copied(layout):
    caches, ids, staging = made(staging=True)
    kv_layout.merge_head_shards_(
        caches, ids, 2 if layout == "HND" else (4,), layout=layout, staging=staging
    )
    for cache, source in zip(caches, staging, strict=True):
        assert torch.equal(bits(cache)[ids], bits(source))


def test_caches_of_two_widths_are_merged(seed):
    """As where K is wider than V."""
    pair = [make[0][0] for make in (made(width=8), made(width=4))]
    before = [x.clone() for x in pair]
    kv_layout.merge_head_shards_(pair, [1, 3], 2)
    for cache, old in zip(pair, before, strict=True):
        want = old[1].reshape(2, 4, 2, -1).transpose(0, 1).reshape(old[1].shape)
        assert torch.equal(bits(cache[1]), bits(want))


def test_ids_on_a_device_and_in_an_array():
    whole = [made()[0] for _ in range(3)]
    given = ([1, 3], torch.tensor([1, 3], dtype=torch.int32), np.array([1, 3]))
    for caches, ids in zip(whole, given, strict=True):
        kv_layout.merge_head_shards_(caches, ids, 2)
    assert all(torch.equal(bits(whole[0][0]), bits(caches[0])) for caches in whole[1:])


def test_both_ways_of_holding_keys_and_values_in_one_tensor():
    caches, ids, _ = made()
    keys, values = caches[0].clone(), caches[1].clone()
    first, second = torch.stack([keys, values]), torch.stack([keys, values], dim=1)
    kv_layout.merge_head_shards_([keys, values], ids, 2)
    kv_layout.merge_head_shards_([first], ids, 2, parts_dim=0)
    kv_layout.merge_head_shards_([second], ids, 2, parts_dim=1)
    assert torch.equal(bits(first), bits(torch.stack([keys, values])))
    assert torch.equal(bits(second), bits(torch.stack([keys, values], dim=1)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"block_ids": [1, 2, 1]}, r"merged twice, which garbles it; block ids: \(1, 2, 1\)"),
        ({"block_ids": [8]}, "run from 8 to 8; caches have 8 blocks"),
        ({"block_ids": [-1]}, "run from -1"),
        ({"shards": 3}, "4 heads cannot be cut into 3"),
        ({"shards": (1, 2)}, r"shards have \(1, 2\) heads, and a block has 4"),
        ({"shards": (4, 0)}, "and a block has 4"),
        ({"layout": "NZ"}, "must be NHD or HND"),
        ({"parts_dim": 1}, "five dimensions"),
        ({"staging": []}, "4 caches and 0 staging buffers"),
    ],
)
def test_calls_that_are_refused(change, found):
    caches, ids, _ = made()
    before = [x.clone() for x in caches]
    call = {"caches": caches, "block_ids": ids, "shards": 2, **change}
    with pytest.raises(ValueError, match=found):
        kv_layout.merge_head_shards_(**call)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(caches, before, strict=True))


def test_tensors_that_are_refused():
    caches, ids, staging = made(staging=True)
    with pytest.raises(ValueError, match="is the layout another one"):
        kv_layout.merge_head_shards_([x.transpose(1, 2) for x in caches], ids, 2)
    with pytest.raises(ValueError, match=r"must be \[num_blocks, block_size"):
        kv_layout.merge_head_shards_([x.flatten(2) for x in caches], ids, 2)
    with pytest.raises(ValueError, match="must share"):
        kv_layout.merge_head_shards_([caches[0], caches[1][:, :2]], ids, 2)
    with pytest.raises(ValueError, match="Staging for 5 blocks"):
        kv_layout.merge_head_shards_(caches, ids, 2, staging=[x[:4] for x in staging])


def test_nobody_takes_the_call(monkeypatch):
    def refuse(_call):
        return False, "not today"

    only = dispatch.Implementation("only", lambda _: None, refuse)
    monkeypatch.setattr(dispatch, "_table", {(merge.OPERATOR, dispatch.ANY_DEVICE): (only,)})
    caches, ids, _ = made()
    with pytest.raises(NotImplementedError, match="merge_head_shards_ on cpu: only: not today"):
        kv_layout.merge_head_shards_(caches, ids, 2)
