"""The causal convolutions in torch against fp64; what they share; their errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gdn_conv_judge import judge_conv
from gdn_conv_oracle import ConvCase, make_conv
from gdn_conv_steps import in_drafts, in_pieces, in_tokens, make_stream, whole
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import arguments, gdn  # noqa: E402

RAGGED = (1, 0, 63, 2, 64, 65, 3, 130, 0)
PREFILL = [
    *(ConvCase(RAGGED, width=width, places=width + 1) for width in (2, 3, 4, 5)),
    ConvCase(RAGGED, padded=(2, 4, 7), tail=3, cache="gaps"),
    ConvCase(RAGGED, padded=(0,), tail=3, given=True, sliced=True, channels=20),
    ConvCase(RAGGED, cache="plain", table=False, bias=False, padded=(8,), tail=1),
    ConvCase(RAGGED, cache="none", silu=False, channels=1, width=3),
    ConvCase(RAGGED, dtype="bfloat16", sliced=True, columns=True),
    ConvCase(RAGGED, dtype="float16", weight_dtype="float32", state_dtype="float32"),
    ConvCase((0, 0)),
    ConvCase((), cache="none"),
    ConvCase((), cache="none", tail=2, given=True),
]
UPDATE = [
    *(ConvCase((1,) * 5, width=width, plain=True, places=6) for width in (2, 3, 4, 5)),
    ConvCase((1,) * 5, plain=True, padded=(0, 3), cache="gaps", dtype="bfloat16"),
    ConvCase((1,) * 5, plain=True, padded=(4,), given=True, sliced=True, channels=20),
    ConvCase((1, 0, 3, 2, 7), padded=(3,), tail=2),
    ConvCase((1, 0, 3, 2, 7), cache="plain", given=True, tail=1, dtype="float16", bias=False),
    ConvCase((1, 2), state_dtype="bfloat16", dtype="bfloat16", weight_dtype="float32", silu=False),
    *(
        ConvCase((3, 0, 1, 2), width=width, places=width + 2, accepted=(1, 2, 3, 1), tail=1)
        for width in (2, 3, 4, 5)
    ),
    ConvCase((4, 4, 4), places=6, accepted=(4, 1, 2), padded=(1,), dtype="bfloat16", given=True),
    ConvCase((1, 1), places=9, accepted=(2, 7), plain=True),
    ConvCase((0, 0), places=4, accepted=(1, 1)),
]


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_is_the_convolution(case: ConvCase, seed: int, poison: None) -> None:
    share = judge_conv(case, seed)
    print(share)
    assert share <= 1


@pytest.mark.parametrize("case", UPDATE, ids=str)
def test_decode_is_the_convolution(case: ConvCase, seed: int, poison: None) -> None:
    share = judge_conv(case, seed, update=True)
    print(share)
    assert share <= 1


def test_what_goes_wrong_is_seen(seed: int) -> None:
    """The judge's own controls: a tap forgotten, a state of zeros, a place too far."""
    case = ConvCase((9,) * 12, dtype="bfloat16")

    def forgetful(weight, **rest):
        weight = weight.clone()
        weight[:, 0] = 0
        return gdn.causal_conv1d(weight=weight, **rest)

    def without_state(has_initial_state, **rest):
        return gdn.causal_conv1d(has_initial_state=torch.zeros_like(has_initial_state), **rest)

    for wrong in (forgetful, without_state):
        assert judge_conv(case, seed, run=wrong) > 10
    # Here the state itself is wrong: one place too old is NaN.
    drafted = ConvCase((3, 1, 2), places=6, accepted=(3, 2, 2))

    def one_early(num_accepted_tokens, **rest):
        return gdn.causal_conv1d_update(num_accepted_tokens=num_accepted_tokens - 1, **rest)

    with pytest.raises(AssertionError):
        judge_conv(drafted, seed, run=one_early, update=True)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 70), max_size=6),
    st.integers(2, 5),
    st.integers(1, 40),
    st.sampled_from(("transposed", "gaps", "plain")),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_batch(lengths, width, channels, cache, table, seed) -> None:
    padded = tuple(n for n in range(len(lengths)) if (seed >> n) % 4 == 0)
    case = ConvCase(tuple(lengths), channels, width, cache=cache, padded=padded, table=table)
    assert judge_conv(replace(case, places=width + 1, tail=seed % 3), seed) <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(2, 5),
    st.booleans(),
    st.sampled_from(("transposed", "gaps", "plain")),
    st.integers(0, 2**31),
)
def test_any_step(tokens, width, drafts, cache, seed) -> None:
    lengths, accepted = zip(*tokens, strict=True)
    padded = tuple(n for n in range(len(lengths)) if (seed >> n) % 4 == 0)
    case = ConvCase(lengths, 9, width, padded=padded, cache=cache, places=width + 4, tail=seed % 3)
    case = replace(case, accepted=accepted if drafts else ())
    assert judge_conv(case, seed, update=True) <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(2, 5),
    st.sampled_from(("float32", "bfloat16")),
    st.integers(0, 2**31),
)
def test_however_a_prompt_is_cut_its_sums_have_the_same_bits(lengths, width, dtype, seed) -> None:
    """Without silu: torch's own has other bits where a vector of them is not full."""
    stream = make_stream(lengths, width, dtype, seed)
    wanted, state = whole(stream)
    for way in (in_pieces, in_tokens, in_drafts):
        found, after = way(stream)
        assert torch.equal(found, wanted), way.__name__
        assert torch.equal(after, state), way.__name__


def test_decode_may_write_where_it_reads(seed: int) -> None:
    for case in (UPDATE[6], UPDATE[9], ConvCase((1,) * 5, plain=True)):
        wanted = gdn.causal_conv1d_update(**make_conv(case, seed, update=True).arguments)
        inputs = make_conv(case, seed, update=True)
        x = inputs.arguments["x"]
        out = gdn.causal_conv1d_update(**inputs.arguments, out=x)
        assert out is x
        assert torch.equal(out[inputs.written], wanted[inputs.written])
        assert torch.isnan(out[~inputs.written]).all()


def test_swish_and_true_are_silu(seed: int) -> None:
    results = []
    for activation in ("silu", "swish", True):
        arguments = make_conv(ConvCase((9, 4)), seed).arguments
        results.append(gdn.causal_conv1d(**{**arguments, "activation": activation}))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_pad_slot_of_ones_own(seed: int) -> None:
    arguments = make_conv(ConvCase((1,) * 4, plain=True), seed, update=True).arguments
    pad = int(arguments["state_indices"][2])
    before = arguments["conv_state"].clone()
    arguments["state_indices"][1] = -7
    out = gdn.causal_conv1d_update(**arguments, pad_slot_id=pad)
    assert (out[1:3] == 0).all()
    assert (out[3] != 0).any()
    written = arguments["state_indices"][[0, 3]].tolist()
    rest = [slot for slot in range(len(before)) if slot not in written]
    after = arguments["conv_state"]
    torch.testing.assert_close(after[rest], before[rest], rtol=0, atol=0, equal_nan=True)
    assert (after[written] != before[written]).any()


def test_accepted_counts_read_nothing_outside(seed: int) -> None:
    """0 and 99 are wrong, but there is no memory before or behind a slot's places to be read."""
    arguments = make_conv(ConvCase((1, 1), places=5, accepted=(1, 1)), seed, update=True).arguments
    arguments["conv_state"][:] = 1.0
    wanted = gdn.causal_conv1d_update(**arguments)
    arguments["conv_state"][:] = 1.0
    arguments["num_accepted_tokens"][:] = torch.tensor([0, 99])
    assert torch.equal(gdn.causal_conv1d_update(**arguments), wanted)


def test_nothing_is_read_where_the_host_knows(seed: int, monkeypatch) -> None:
    """No scalar, no list and no index that depends on a value: seen on the reference itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)

        def noted(self, *args, _real=real, _name=name):
            seen.append(_name)
            return _real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, noted)
    # On a CPU values are held against the cache and the tokens; elsewhere nothing may be read.
    monkeypatch.setattr(arguments, "on_host", lambda x: False)
    case = ConvCase(RAGGED, padded=(2,), tail=3)
    known, unknown = (make_conv(c, seed).arguments for c in (case, replace(case, table=False)))
    steps = ConvCase((1,) * 4, plain=True, padded=(2,))
    step = make_conv(steps, seed, update=True).arguments
    seen.clear()
    with Count():
        gdn.causal_conv1d(**known)
        gdn.causal_conv1d_update(**step)
    assert not seen
    # The control: lengths on the device alone are read.
    with Count():
        gdn.causal_conv1d(**unknown)
    assert seen == ["tolist"]


CALL = {"x": (6, 4), "weight": (4, 3), "conv_state": (5, 4, 2)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "relu"}, ValueError, "activation must be 'silu'"),
        ({"x": torch.zeros(6, 4, dtype=torch.float64)}, TypeError, "x must be bfloat16"),
        ({"x": torch.zeros(1, 6, 4)}, ValueError, "x must be .T, C., tokens first"),
        ({"weight": torch.zeros(4, 1)}, ValueError, "weight must be .4, W. with W from 2 to 5"),
        ({"weight": torch.zeros(3, 3)}, ValueError, "weight must be .4, W."),
        ({"bias": torch.zeros(3)}, ValueError, "bias must be .4."),
        ({"conv_state": torch.zeros(5, 2, 4)}, ValueError, "goes in transposed"),
        ({"out": torch.zeros(6, 5)}, ValueError, "out must be"),
        ({"state_indices": torch.zeros(2)}, TypeError, "state_indices must be int32"),
        ({"state_indices": torch.zeros(2, 2).int()}, ValueError, "state_indices must be .N."),
        ({"has_initial_state": torch.zeros(2)}, TypeError, "has_initial_state must be bool"),
        ({"state_indices": torch.zeros(1).int()}, ValueError, "entry for each of 2 sequences"),
        ({"query_start_loc": torch.zeros(3)}, TypeError, "query_start_loc must be int32"),
        ({"query_start_loc": torch.zeros(3, 1).int()}, ValueError, "must be .N . 1."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_sentences(change, error, words) -> None:
    call = {name: torch.zeros(shape) for name, shape in CALL.items()}
    call |= {"state_indices": torch.zeros(2).int(), "query_start_loc": torch.tensor([0, 2, 6])}
    with pytest.raises(error, match=words):
        gdn.causal_conv1d(**{**call, **change})


def test_sentences_about_combinations() -> None:
    x, weight, state = (torch.zeros(shape) for shape in CALL.values())
    with pytest.raises(ValueError, match="give conv_state too"):
        gdn.causal_conv1d(x, weight, state_indices=torch.zeros(1).int())
    with pytest.raises(ValueError, match="out is x"):
        gdn.causal_conv1d(x, weight, out=x)
    metadata = gdn.build_chunk_metadata(torch.tensor([0, 7]), torch.device("cpu"))
    with pytest.raises(ValueError, match="end at token 7, but x has 6"):
        gdn.causal_conv1d(x, weight, chunk_metadata=metadata)
    with pytest.raises(ValueError, match="needs state_indices"):
        gdn.causal_conv1d_update(x, state, weight, query_start_loc=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="5 slots for 6 sequences"):
        gdn.causal_conv1d_update(x, state, weight)
    slots, starts = torch.zeros(3).int(), torch.tensor([0, 6])
    with pytest.raises(ValueError, match="2 entries for 3 sequences"):
        gdn.causal_conv1d_update(x, state, weight, state_indices=slots, query_start_loc=starts)
    with pytest.raises(TypeError, match="num_accepted_tokens must be int32"):
        gdn.causal_conv1d_update(x[:5], state, weight, num_accepted_tokens=torch.zeros(5))
