"""The torch reference of recurrent_gated_delta_rule against fp64; its errors; its properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gdn_decode_judge import judge_decode
from gdn_decode_oracle import DecodeCase, make_decode
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import gdn  # noqa: E402

LIMIT = 2e-6
RAGGED = (1, 3, 0, 2, 4)
CASES = [
    DecodeCase(),
    DecodeCase(layout="KV"),
    DecodeCase(1, key_size=128, value_size=64, sliced=True),
    DecodeCase(5, layout="KV", raw=False, sliced=True, tail=0, padded=(0, 3), rows=2),
    DecodeCase(5, raw=False, decay=20.0, normalise=False),
    DecodeCase(4, padded=(0, 1, 2, 3)),
    DecodeCase(0),
    DecodeCase(3, key_heads=1, value_heads=3, key_size=256, value_size=64, scale=0.5),
    DecodeCase(lengths=(1, 1, 0, 1), tail=2),
    DecodeCase(lengths=RAGGED, width=4, tail=3, sliced=True, rows=1),
    DecodeCase(lengths=RAGGED, width=4, layout="KV", raw=False, padded=(1, 2)),
    DecodeCase(lengths=RAGGED, width=2, accepted=False),
    DecodeCase(lengths=RAGGED, layout="KV", padded=(4,)),
    DecodeCase(lengths=(0, 0), width=3),
    DecodeCase(3, width=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_recurrence(case: DecodeCase, seed: int) -> None:
    errors = judge_decode(case, seed)
    print(f"{case}: {errors}")
    assert all(error < LIMIT for error in errors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_once(dtype: str, seed: int) -> None:
    case = replace(CASES[9], dtype=dtype, state_dtype="bfloat16")
    out, states = judge_decode(case, seed)
    assert out < torch.finfo(getattr(torch, dtype)).eps / 2
    assert states < torch.finfo(torch.bfloat16).eps / 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from((1, 2, 3)),
    st.sampled_from(("KV", "VK")),
    st.booleans(),
    st.sets(st.integers(0, 5)),
    st.integers(0, 2**31),
)
def test_any_step(lengths, width, accepted, group, layout, raw, padded, seed) -> None:
    case = DecodeCase(
        lengths=tuple(lengths),
        width=width,
        accepted=accepted,
        padded=tuple(sorted(n for n in padded if n < len(lengths))),
        value_heads=2 * group,
        key_size=16,
        value_size=24,
        layout=layout,
        raw=raw,
        sliced=raw,
    )
    assert max(judge_decode(case, seed)) < LIMIT


@pytest.mark.parametrize(
    "fault",
    ["beta zeroed", "decay ignored", "layout swapped", "norm forgotten", "accepted forgotten"],
)
def test_a_fault_is_noticed(fault: str, seed: int) -> None:
    """The bound has power: each of these exceeds it by orders."""

    def run(**arguments):
        if fault == "beta zeroed":
            arguments["b"] = torch.full_like(arguments["b"], -100.0)
        if fault == "decay ignored":
            arguments["A_log"] = torch.full_like(arguments["A_log"], -100.0)
        if fault == "layout swapped":
            arguments["state_layout"] = "KV"
        if fault == "norm forgotten":
            arguments["use_qk_l2norm_in_kernel"] = False
        if fault == "accepted forgotten":
            arguments["num_accepted_tokens"] = torch.ones(4, dtype=torch.int32)
        return gdn.recurrent_gated_delta_rule(**arguments)

    case = DecodeCase(lengths=(3, 2, 4, 1), width=4, key_size=64, value_size=64)
    # Seeds in which every request accepted one token would not show the last fault.
    while (make_decode(case, seed).arguments["num_accepted_tokens"] == 1).all():
        seed += 1
    assert max(judge_decode(case, seed, run=run)) > 1e-2


@pytest.mark.parametrize("layout", ["VK", "KV"])
@pytest.mark.parametrize("tokens", [1, 5, 67])
def test_steps_one_by_one_are_one_prefill(layout: str, tokens: int, seed: int) -> None:
    case = DecodeCase(lengths=(tokens,), layout=layout, raw=False)
    inputs = make_decode(case, seed)
    given = dict(inputs.arguments)
    prefilled = inputs.before.clone()
    arguments = {**given, "state": prefilled, "has_initial_state": torch.tensor([True])}
    wanted, _ = gdn.chunk_gated_delta_rule(**arguments)
    stepped = inputs.before.clone()
    rows = []
    for token in range(tokens):
        step = {name: given[name][:, token : token + 1] for name in ("q", "k", "v", "g", "beta")}
        rest = {name: given[name] for name in ("state_layout", "state_indices")}
        rows.append(
            gdn.recurrent_gated_delta_rule(
                **step, **rest, state=stepped, use_qk_l2norm_in_kernel=True
            )
        )
    torch.testing.assert_close(torch.cat(rows, 1), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepped, prefilled, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_drafts_rejected_tokens_leave_no_trace(accepted: list[int], seed: int) -> None:
    """Steps of 4 drafted tokens, of which some count, leave what the counted tokens alone leave."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"key_size": 16, "value_size": 24, "raw": False}
    case = DecodeCase(lengths=(4 * len(accepted),), width=4, **sizes)
    inputs = make_decode(case, seed)
    given = inputs.arguments
    drafted, last, counted = given["state"].clone(), 1, []
    indices = torch.randperm(len(drafted), generator=generator)[None, :4].int()
    begun = drafted[indices[0, :1]].clone()
    for step, count in enumerate(accepted):
        at = slice(4 * step, 4 * step + 4)
        gdn.recurrent_gated_delta_rule(
            **{name: given[name][:, at] for name in ("q", "k", "v", "g", "beta")},
            state=drafted,
            state_layout="VK",
            state_indices=indices,
            cu_seqlens=torch.tensor([0, 4]),
            num_accepted_tokens=torch.tensor([last]),
        )
        counted += range(4 * step, 4 * step + count)
        last = count
    gdn.recurrent_gated_delta_rule(
        **{name: given[name][:, counted] for name in ("q", "k", "v", "g", "beta")},
        state=begun,
        state_layout="VK",
        state_indices=torch.tensor([0]),
        cu_seqlens=torch.tensor([0, len(counted)]),
    )
    torch.testing.assert_close(drafted[indices[0, last - 1]], begun[0])


def test_gates_given_and_gates_computed_agree(seed: int) -> None:
    given = make_decode(DecodeCase(5), seed).arguments
    other = dict(given, state=given["state"].clone())
    g, beta = gdn.fused_gating(*(other.pop(name) for name in ("a", "b", "A_log", "dt_bias")))
    found = gdn.recurrent_gated_delta_rule(**given)
    assert torch.equal(found, gdn.recurrent_gated_delta_rule(**other, g=g, beta=beta))
    assert torch.equal(given["state"], other["state"])


def call(case: DecodeCase, **changes) -> None:
    arguments = make_decode(case, 1).arguments
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    gdn.recurrent_gated_delta_rule(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state_layout": "vk"}, ValueError, "must be 'VK' or 'KV', not 'vk'"),
        ({"q": lambda q: q[0]}, ValueError, r"q must be \[1, T, heads, size\], not"),
        ({"v": lambda v: v.half()}, TypeError, "q, k and v must have one dtype"),
        ({"k": lambda k: k[:, :, :1]}, ValueError, "must agree, and v"),
        ({"v": lambda v: v[:, :, :3]}, ValueError, "a multiple of their heads"),
        ({"state": lambda s: s.transpose(-1, -2)}, ValueError, r"VK must be \[slots, 4, 128, 64\]"),
        ({"state": lambda s: s.long()}, TypeError, "state must be bfloat16, float16 or float32"),
        ({"a": None}, ValueError, "give either g and beta, or a, b, A_log and dt_bias"),
        ({"g": torch.zeros(1, 6, 4)}, ValueError, "give either g and beta"),
        ({"a": lambda a: a[:3], "b": lambda b: b[:3]}, ValueError, r"a and b must be \[6, 4\]"),
        ({"b": lambda b: b.int()}, TypeError, "b must be bfloat16, float16 or float32"),
        ({"dt_bias": lambda x: x[:2]}, ValueError, "dt_bias must have one entry for each of 4"),
        ({"state_indices": lambda i: i.float()}, TypeError, "state_indices must be int32 or int64"),
        ({"state_indices": lambda i: i[:1]}, ValueError, "has 1 rows for 3 requests"),
        ({"state_indices": lambda i: i[:, 0]}, ValueError, "chooses a column of state_indices"),
        ({"state_indices": lambda i: i[:, :0]}, ValueError, "must have a column at least"),
        ({"state_indices": lambda i: i[..., None]}, ValueError, r"must be \[N\] or \[N, S\]"),
        ({"num_accepted_tokens": lambda n: n[:2]}, ValueError, "has 2 rows for 3 requests"),
        ({"cu_seqlens": lambda c: c[:, None]}, ValueError, "cu_seqlens must be of one dimension"),
        ({"cu_seqlens": lambda c: c[:0]}, ValueError, "one entry more than there are requests"),
        ({"out": torch.zeros(1, 6, 4, 64)}, ValueError, "out must be"),
    ],
)
def test_errors_are_sentences(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        call(DecodeCase(lengths=(1, 2, 3), width=3), **changes)


def test_computed_gates_have_a_shape_too() -> None:
    with pytest.raises(ValueError, match=r"beta must be \[1, 3, 4\]"):
        call(DecodeCase(raw=False), beta=lambda b: b[:, :1])
    with pytest.raises(TypeError, match="g must be bfloat16"):
        call(DecodeCase(raw=False), g=lambda g: g.long())
