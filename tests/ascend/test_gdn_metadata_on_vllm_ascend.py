"""The tables of vllm_ascend's GDN builders: what is in them, and what arrives on a late device."""

from __future__ import annotations

import functools

import pytest
from ascend_gdn_runs import run

pytestmark = pytest.mark.slow

TABLES = """
import ascend_gdn_metadata as m
batches = m.lengths_of(SEED, 60)
found = {
    "two in turn": {n: m.by_two_in_turn(batches, n) for n in (0, 1, 30)},
    "ours": {n: m.by_ours(batches, n, m.ours_0_18) for n in (0, 1, 30, 1000)},
}
# One request more than the release has room for: what a dummy request that pads a batch makes.
many = [[3] * 10, [70] * 9 + [0, 5]]
found["too many"] = m.by_two_in_turn(many, 0)
found["too many, ours"] = m.by_ours(many, 0, m.ours_0_18)
print(json.dumps(found))
"""


@functools.cache
def tables() -> dict:
    return run("0.18.0", "import vllm_ascend.patch.worker\n" + TABLES, patches="none")


def test_0_18_0_s_own_tables_are_right_while_nothing_is_in_flight():
    """Raw sequence numbers, which each of its kernels looks up in cu_seqlens: they stay."""
    assert not any(tables()["two in turn"]["0"])


def test_two_buffers_in_turn_are_overwritten_before_a_late_device_reads_them():
    found = tables()["two in turn"]["30"]
    print(sum(map(bool, found)), "of", len(found), "batches arrive changed")
    assert sum(map(bool, found)) > len(found) // 2


def test_ours_arrive_however_late_the_device_is():
    for in_flight, found in tables()["ours"].items():
        assert not any(found), f"{in_flight} in flight"


def test_a_request_more_than_max_num_seqs_has_room():
    """Without a word, the release's offsets end where its buffers do."""
    for found in tables()["too many"]:
        assert {"chunk_offsets_chunk64", "final_chunk_indices_chunk64"} <= set(found)
    assert not any(tables()["too many, ours"])


HOST_VALUES = """
import ascend_gdn, ascend_gdn_cases
from ascend_gdn import Model, gdn_attn
from vllm_ascend.patch.worker import patch_qwen3_5, patch_qwen3_next
import device_reads
known, seen, reads = [], [], 0
NAMES = ("non_spec_query_start_loc", "non_spec_state_indices_tensor", "has_initial_state")
for name, case in ascend_gdn_cases.CASES.items():
    for mode in ("none", "align"):
        model = Model("qwen3_next", SEED, "VK", **case.sizes)
        model.config.cache_config.mamba_cache_mode = mode
        requests = [model.world.request() for _ in range(3)]
        if mode == "align":
            # A block for each 64 tokens of the text, in any order.
            model.table = ascend_gdn.BlockTable(64, 16, 16, 4096, False, ascend_gdn.CPU, [64])
            model.table.block_table.cpu.fill_(31)
            blocks = torch.randperm(48, generator=model.world.random)
            for n, request in enumerate(requests):
                request.slots = blocks[n * 16 : n * 16 + 16].tolist()
        for step, padding in case.steps:
            turns = [requests[n].takes(c, drafts=a is not None) for n, c, a in step]
            metadata, _ = model.build(turns, padding)
            if metadata.num_prefills:
                for field in NAMES:
                    tensor = getattr(metadata, field)
                    with device_reads.counted() as count:
                        found = patch_qwen3_5.to_int64_tuple(tensor)
                    reads += sum(count.values())
                    other = patch_qwen3_next.to_int64_tuple(tensor.clone())
                    known.append(list(found))
                    seen.append(list(other))
            for turn, (_, c, a) in zip(turns, step):
                turn.keep(c if a is None else a)
print(json.dumps([known, seen, reads]))
"""


def test_what_the_host_knows_of_a_batch_is_what_the_device_has():
    """Of a clone nothing is known: it is read. Both cache modes, padding, drafts."""
    known, seen, reads = run("0.18.0", HOST_VALUES)
    assert len(known) > 60
    assert known == seen
    assert reads == 0
    _, stock, reads = run("0.18.0", HOST_VALUES, patches="none")
    assert reads == len(stock) == len(seen)


TABLES_0_23 = """
sys.modules.setdefault("vllm_ascend.device.device_op", None) if False else None
import vllm_ascend.ops
import vllm_ascend.ops.gdn_attn_builder
import ascend_gdn_metadata as m
batches = m.lengths_of(SEED, 40)
cpu = torch.device("cpu")
made = [m.ours_0_23(b, cpu) for b in batches]
lists = []
for batch, found in zip(batches, made):
    keep = found.keep_meta
    keep = None if keep is None else [keep.dtype == torch.bool, keep.tolist()]
    lists.append([found.cu_seqlens_host, found.cu_seqlens_kern, found.chunk_indices_chunk64_host,
                  keep, found.num_decodes])
tables = [m.wrong(found, b) for b, found in zip(batches, made)]
late = None if patch()["state"] == "off" else m.by_ours(batches, 30, m.ours_0_23)
print(json.dumps([batches, tables, lists, late]))
"""


@functools.cache
def tables_0_23(patches: str) -> list:
    return run("0.23.0", TABLES_0_23, patches=patches)


def test_0_23_0_numbers_sequences_without_the_empty_ones_and_looks_them_up_among_all():
    batches, wrong, _, _ = tables_0_23("none")
    for batch, found in zip(batches, wrong, strict=True):
        used = [n for n, length in enumerate(batch) if length]
        in_the_middle = used != list(range(len(used)))
        assert ("chunk_indices_chunk64" in found) == in_the_middle, (batch, found)
    batches, wrong, _, late = tables_0_23("gdn_attn")
    assert not any(wrong)
    assert not any(late)


def test_0_23_0_s_lists_for_ascendc_have_no_empty_sequence():
    batches, _, lists, _ = tables_0_23("gdn_attn")
    for batch, (host, kernel, pairs, keep, decodes) in zip(batches, lists, strict=True):
        lengths = [n for n in batch if n]
        ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
        some = len(lengths) < len(batch)
        assert host == [0, *ends]
        assert kernel == (host if some else None)
        wanted = [
            x for n, length in enumerate(lengths) for c in range(-(-length // 64)) for x in (n, c)
        ]
        assert pairs == wanted
        # By number: for a mask the host would have to count on the device.
        assert keep == ([False, [n for n, length in enumerate(batch) if length]] if some else None)
        assert decodes == sum(n == 1 for n in batch)
    _, _, stock, _ = tables_0_23("none")
    assert any(keep and keep[0] for *_, keep, _ in stock), "what is to be mended is not there"
