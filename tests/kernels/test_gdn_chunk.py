"""The torch reference of chunk_gated_delta_rule against the fp64 recurrence; its errors."""

from __future__ import annotations

from dataclasses import replace

import gdn_judge
import pytest
from gdn_oracle import Case, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import gdn  # noqa: E402
from ascend_patch.kernels.gdn import reference  # noqa: E402

RAGGED = (1, 63, 0, 64, 65, 127, 2)
# float32's own: with strong decay the differences of running sums are what is rounded.
LIMIT = 1e-5
CASES = [
    Case(RAGGED),
    Case(RAGGED, layout="KV"),
    Case(RAGGED, states="none"),
    Case(RAGGED, states="cache"),
    Case(RAGGED, states="cache", layout="KV", sliced=True, tail=3),
    Case(RAGGED, decay=20.0),
    Case(RAGGED, decay=1e-3, normalise=False),
    Case((200, 130), same_keys=True, decay=1e-4),
    Case((4097,), key_heads=1, value_heads=1),
    Case((), states="none"),
    Case((0, 0)),
    Case((70, 3), key_size=128, value_size=64, key_heads=1, value_heads=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_recurrence(case: Case, seed: int) -> None:
    out, final = gdn_judge.judge(case, seed)
    print(f"{case}: {out:.1e}, {final:.1e}")
    assert out < LIMIT
    assert final < LIMIT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_result_is_rounded_once(dtype: str, seed: int) -> None:
    case = Case(RAGGED, dtype=dtype, state_dtype="bfloat16", states="cache")
    out, final = gdn_judge.judge(case, seed)
    assert out < torch.finfo(getattr(torch, dtype)).eps / 2
    assert final < torch.finfo(torch.bfloat16).eps / 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 140), max_size=6),
    st.sampled_from((1, 2, 3)),
    st.sampled_from(("none", "initial", "cache")),
    st.sampled_from(("KV", "VK")),
    st.integers(0, 2**31),
)
def test_any_batch(lengths: list[int], group: int, states: str, layout: str, seed: int) -> None:
    sizes = {"key_heads": 2, "value_heads": 2 * group, "key_size": 16, "value_size": 24}
    case = Case(tuple(lengths), states=states, layout=layout, **sizes)
    out, final = gdn_judge.judge(case, seed)
    assert out < LIMIT
    assert final < LIMIT


@pytest.mark.parametrize(
    "fault", ["beta zeroed", "decay ignored", "chunks forgotten", "layout swapped"]
)
def test_a_fault_is_noticed(fault: str, seed: int) -> None:
    """The bounds above have power: each of these exceeds them by orders."""

    def run(**arguments):
        if fault == "beta zeroed":
            arguments["beta"] = torch.zeros_like(arguments["beta"])
        if fault == "decay ignored":
            arguments["g"] = torch.zeros_like(arguments["g"])
        if fault == "layout swapped":
            arguments["state_layout"] = "KV"
        if fault == "chunks forgotten":
            starts = torch.tensor([0, 64, 128, 200])
            metadata = gdn.build_chunk_metadata(starts, torch.device("cpu"))
            arguments["initial_state"] = arguments["initial_state"].expand(3, -1, -1, -1)
            out, final = gdn.chunk_gated_delta_rule(**arguments, chunk_metadata=metadata)
            return out, final[-1:]
        return gdn.chunk_gated_delta_rule(**arguments)

    case = Case((200,), key_size=64, value_size=64)
    out, _ = gdn_judge.judge(case, seed, run=run)
    assert out > 1e-2


def call(case: Case, **changes) -> None:
    arguments = make_inputs(case, 1).arguments
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    gdn.chunk_gated_delta_rule(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state_layout": "vk"}, ValueError, "must be 'VK' or 'KV', not 'vk'"),
        ({"q": lambda q: q[0]}, ValueError, r"q must be \[1, T, ...\] of rank 4, not"),
        ({"g": lambda g: g.long()}, TypeError, "g must be bfloat16, float16 or float32"),
        ({"v": lambda v: v.half()}, TypeError, "q, k and v must have one dtype"),
        ({"k": lambda k: k[:, :, :1]}, ValueError, "must agree, and v"),
        ({"v": lambda v: v[:, :, :3]}, ValueError, "a multiple of their heads"),
        ({"beta": lambda b: b[:, :2]}, ValueError, r"beta must be \[1, 8, 4\]"),
        ({"initial_state": lambda _: torch.zeros(1)}, ValueError, "not both"),
        ({"state_indices": None}, ValueError, "state and state_indices go together"),
        ({"state_indices": lambda i: i.float()}, TypeError, "must be int32 or int64"),
        ({"state": lambda s: s.transpose(-1, -2)}, ValueError, r"layout VK must be \[.., 4, 128"),
        ({"state": lambda s: s.long()}, TypeError, "state must be bfloat16, float16 or float32"),
        ({"state_indices": lambda i: i[:1]}, ValueError, "has 1 entries for 2 sequences"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "end at token 9, but q has 8"),
        ({"out": torch.zeros(1, 8, 4, 64)}, ValueError, "out must be"),
    ],
)
def test_errors_are_sentences(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        call(Case((5, 3), states="cache"), **changes)


def test_initial_flags_belong_to_a_cache() -> None:
    with pytest.raises(ValueError, match="has_initial_state is about slots of a cache"):
        call(Case((5,)), has_initial_state=torch.ones(1, dtype=torch.bool))


def test_one_sequence_needs_no_cu_seqlens(seed: int) -> None:
    case = Case((70,), states="none")
    arguments = make_inputs(case, seed).arguments
    wanted, _ = gdn.chunk_gated_delta_rule(**arguments)
    del arguments["cu_seqlens"]
    got, final = gdn.chunk_gated_delta_rule(**arguments, output_final_state=False)
    assert torch.equal(got, wanted)
    assert final is None


def test_chunks_of_the_reference_do_not_matter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 16, 200):
        monkeypatch.setattr(reference, "CHUNK", size)
        out, final = gdn_judge.judge(replace(CASES[0], states="cache"), seed)
        assert max(out, final) < LIMIT
