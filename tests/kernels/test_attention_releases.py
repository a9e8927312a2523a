"""Each row of four releases: we answer with the row that we say, and theirs is as wrong as we say.

Their calls are made on the operator surface with their arguments; what `_npu_flash_attention`
computes under their mask is written as the causal call that equals it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import attention_batches as batches  # noqa: E402

from ascend_patch.kernels.attention import calls, keys  # noqa: E402
from ascend_patch.kernels.attention.attend import causal_mask  # noqa: E402
from ascend_patch.kernels.attention.case import FUSION, HOST  # noqa: E402
from ascend_patch.kernels.attention.releases import (  # noqa: E402
    RELEASES,
    VERDICTS,
    behaviours,
)
from ascend_patch.kernels.attention.route import route  # noqa: E402
from ascend_patch.kernels.npu_ops import surface  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402

EACH = [(release, b) for b in behaviours() for release in b.releases]
IDS = [f"{release} {b.name}" for release, b in EACH]


@pytest.fixture(autouse=True)
def on_the_surface():
    surface.install()
    with surface.settings(allow=("float32",)):
        yield


@pytest.mark.parametrize(("release", "behaviour"), EACH, ids=IDS)
def test_we_answer_with_the_row_that_we_say(release, behaviour):
    found = route(behaviour.case)
    assert found.row == behaviour.row
    assert (found.operator == HOST) == (behaviour.verdict == "host's own")
    assert behaviour.verdict in VERDICTS
    assert release in RELEASES


def test_a_name_is_said_once_a_release():
    assert len(set(IDS)) == len(IDS)


def test_every_release_has_its_rows():
    counts = {release: sum(r == release for r, _ in EACH) for release in RELEASES}
    assert min(counts.values()) >= 15, counts


def asked_for(behaviour, seed):
    """A small batch in which the behaviour shows: its requests have contexts and windows."""
    case = behaviour.case
    prefill = case.state == "prefill"
    cross = case.attn_type == "encoder_decoder"
    return batches.Asked(
        case.state,
        queries=(1, 1, 1) if case.state == "decode" else (3, 9, 6),
        contexts=(0, 0, 0) if prefill and not cross else (20, 33, 40),
        causal=case.causal,
        head_size=case.head_size,
        num_kv_heads=8 if behaviour.name == "wide heads" else 2,
        group=1 if behaviour.name == "wide heads" else 4,
        window=case.sliding_window,
        sinks=case.sinks,
        attn_type=case.attn_type,
        dummies=2 if case.padded else 0,
        seed=seed,
    )


def fused(made, found, **changed):
    """One TND call, with ``found`` or what a release has in its place."""
    batch, asked = made.batch, made.asked
    found = replace(found, **{"layout": "TND", "per_request": False, **changed})
    mask = causal_mask("cpu") if found.mask == "causal" else None
    about = (8, asked.num_kv_heads, asked.head_size, asked.head_size**-0.5)
    heads = calls.Heads(*about, made.sinks, mask)
    query = made.query[: batch.end]
    key, value, table = made.key[: batch.end], made.value[: batch.end], None
    if found.cache != "none":
        key, value, table = keys.paged((made.key_cache, made.value_cache), batch, tnd=True)
    return calls.together(found, batch.whole, query, key, value, table, heads)


def causal_in_place_of(made, found):
    return fused(made, found, sparse_mode=3, mask="causal", pre_tokens=None, next_tokens=None)


def window_as_pre_tokens(made, found):
    return fused(made, found, cache="paged", pre_tokens=made.asked.window)


def everything_seen(made, found):
    return fused(made, found, sparse_mode=0, mask="none", pre_tokens=None, next_tokens=None)


def this_step_alone(made, found):
    """npu_fusion_attention: what is cached is not among its keys."""
    mode = 3 if made.asked.causal else 0
    mask = "causal" if mode else "none"
    return fused(made, found, operator=FUSION, sparse_mode=mode, mask=mask, cache="none")


def single_queries_in_bsh(made, found):
    """_forward_fia_slidingwindow, as it stands."""
    asked, batch = made.asked, made.batch
    size = asked.head_size
    out = torch.ops.npu.npu_fused_infer_attention_score(
        made.query[:3].reshape(3, 1, 8 * size),
        made.key_cache.flatten(2, 3).contiguous(),
        made.value_cache.flatten(2, 3).contiguous(),
        num_heads=8,
        num_key_value_heads=2,
        input_layout="BSH",
        block_size=asked.block_size,
        pre_tokens=asked.window,
        scale=size**-0.5,
        block_table=batch.rows,
        actual_seq_lengths=[1, 1, 1],
        actual_seq_lengths_kv=batch.kv_lens,
    )[0]
    return out.view(3, 8, size)


def window_in_the_mask(made, found):
    """0.18.0's get_swa_mask, and the window as pre_tokens."""
    asked, batch = made.asked, made.batch
    ones = torch.ones(2048, 2048, dtype=torch.bool)
    key, value, table = keys.paged((made.key_cache, made.value_cache), batch, tnd=True)
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        made.query[: batch.end],
        key,
        value,
        num_query_heads=8,
        num_key_value_heads=2,
        input_layout="TND",
        pre_tokens=asked.window,
        next_tokens=0,
        atten_mask=torch.triu(ones, 1) + torch.tril(ones, -asked.window),
        sparse_mode=4,
        softmax_scale=asked.head_size**-0.5,
        block_table=table,
        block_size=asked.block_size,
        actual_seq_qlen=batch.ends,
        actual_seq_kvlen=batch.kv_lens,
        learnable_sink=made.sinks,
    )[0]


def lengths_as_they_are(made, found):
    """More query ends than lengths."""
    batch = made.batch
    key, value, table = keys.paged((made.key_cache, made.value_cache), batch, tnd=True)
    return torch.ops.npu.npu_fused_infer_attention_score(
        made.query[: batch.query_ends[-1]],
        key,
        value,
        num_heads=8,
        num_key_value_heads=2,
        input_layout="TND",
        atten_mask=causal_mask("cpu"),
        sparse_mode=3,
        scale=made.asked.head_size**-0.5,
        block_table=table,
        block_size=made.asked.block_size,
        actual_seq_lengths=batch.query_ends,
        actual_seq_lengths_kv=batch.seq_lens,
    )[0]


def encoder_s_keys_as_a_prompt(made, found):
    """Mode 3 on the encoder's keys, whose ends are the sums of their lengths."""
    batch = made.batch
    return torch.ops.npu.npu_fused_infer_attention_score(
        made.query[: batch.end],
        torch.cat(made.keys),
        torch.cat(made.values),
        num_heads=8,
        num_key_value_heads=2,
        input_layout="TND",
        atten_mask=causal_mask("cpu"),
        sparse_mode=3,
        scale=made.asked.head_size**-0.5,
        actual_seq_lengths=batch.ends,
        actual_seq_lengths_kv=torch.tensor(batch.kv_lens).cumsum(0).tolist(),
    )[0]


THEIRS = {
    ("0.11.0", "encoder window"): everything_seen,
    ("0.11.0", "prefill window"): causal_in_place_of,
    ("0.11.0", "cache hit window"): causal_in_place_of,
    ("0.11.0", "chunked window"): causal_in_place_of,
    ("0.13.0", "pooling cache hit"): this_step_alone,
    ("0.13.0", "pooling chunked"): this_step_alone,
    ("0.18.0", "sinks window"): window_in_the_mask,
    ("0.23.0", "sinks window"): window_as_pre_tokens,
    ("0.23.0", "window"): window_as_pre_tokens,
    ("0.23.0", "wide window"): window_as_pre_tokens,
    ("0.23.0", "not causal window"): everything_seen,
}
for _release in ("0.13.0", "0.18.0", "0.23.0"):
    THEIRS[_release, "wide heads"] = causal_in_place_of
for _release in ("0.11.0", "0.13.0", "0.18.0"):
    THEIRS[_release, "decode window"] = single_queries_in_bsh
for _release in ("0.13.0", "0.18.0"):
    THEIRS[_release, "prefill window"] = causal_in_place_of
    THEIRS[_release, "chunked window"] = causal_in_place_of
    THEIRS[_release, "not causal"] = causal_in_place_of
    THEIRS[_release, "not causal prefill"] = causal_in_place_of
    THEIRS[_release, "cross attention"] = encoder_s_keys_as_a_prompt
    THEIRS[_release, "padded requests"] = lengths_as_they_are
for _release in ("0.13.0", "0.18.0", "0.23.0"):
    THEIRS[_release, "encoder window"] = everything_seen
    THEIRS[_release, "pooling not causal cache"] = this_step_alone

# No operator is called: an exception stops them before.
STOPPED = {"cross attention", "speculation"}


def test_all_that_is_called_wrong_is_shown():
    wanted = {(r, b.name) for r, b in EACH if b.verdict in ("wrong", "depends on CANN")}
    wanted |= {(r, b.name) for r, b in EACH if b.verdict == "fails" and b.name not in STOPPED}
    assert set(THEIRS) == wanted


@pytest.mark.parametrize(
    ("release", "behaviour"),
    [(r, b) for r, b in EACH if (r, b.name) in THEIRS],
    ids=[f"{r} {b.name}" for r, b in EACH if (r, b.name) in THEIRS],
)
def test_what_a_release_does_is_wrong_and_what_we_do_is_right(release, behaviour, seed):
    asked = asked_for(behaviour, seed)
    found = route(asked.case)
    made = batches.make(asked)
    ours = made.answer(found)
    assert not made.judge(ours)
    try:
        out = THEIRS[release, behaviour.name](made, found)
    except OperatorError:
        assert behaviour.verdict == "fails" or behaviour.name == "sinks window"
        return
    assert behaviour.verdict in ("wrong", "depends on CANN")
    theirs = ours.clone()
    theirs[: made.ends[-1]] = out[: made.ends[-1]]
    assert made.judge(theirs), "the release is right here"
