"""What counts as a difference between two tensors, and between two calls."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch import _compare, _copies  # noqa: E402

INF, NAN = math.inf, math.nan
FLOATS = ["bfloat16", "float16", "float32", "float64"]


def differ(expected, got, **more):
    return _compare.of_tensors(torch.as_tensor(expected), torch.as_tensor(got), **more)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_error_is_counted_in_epsilons_of_the_row(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(5, 64, generator=generator).to(getattr(torch, dtype))
    expected[3] *= 2.0**-6
    got = expected.double().clone()
    step = torch.finfo(expected.dtype).eps * float(expected[3].abs().max())
    got[3, 7] += 2.0 * step
    found = differ(expected, got.to(expected.dtype))
    # Rounded to the dtype again, which is half an epsilon at most.
    assert 1.5 <= found.error <= 2.5
    assert not found.wrong
    got[3, 7] += 30.0 * step
    found = differ(expected, got.to(expected.dtype))
    assert found.share > 1
    assert "1 of 320 elements are out of bounds, the worst at (3, 7)" in found.wrong


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_equal_does_not_differ_whatever_it_is(dtype):
    values = torch.tensor([[0.0, -0.0, INF, -INF, NAN, 1e-30, 1.0]]).to(getattr(torch, dtype))
    found = differ(values, values.clone())
    assert (found.share, found.error, found.wrong) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, 2.0], [1.0, INF]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, INF], [1.0, 2.0]),
        ([INF, 2.0], [INF, 3.0]),  # the bound is that of the finite ones
        ([0.0, 0.0], [0.0, 1e-20]),
        ([1.0, 2.0], [2.0, 1.0]),
        ([NAN, 2.0], [NAN, -2.0]),
        ([1, 2], [1, 3]),
        ([True, False], [True, True]),
        ([1.0, 2.0], [[1.0, 2.0]]),
        ([1, 2], [1.0, 2.0]),
        ([1.0 + 2.0j], [1.0 - 2.0j]),
        (1.0, 2.0),
    ],
    ids=str,
)
def test_a_difference_is_found(expected, got):
    found = differ(expected, got)
    assert found.wrong
    assert found.share > 1


def test_where_the_expected_is_no_number_there_is_nothing_to_compare():
    assert not differ([NAN, 2.0], [5.0, 2.0]).wrong


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
def test_nothing_agrees_with_nothing(shape):
    assert not differ(torch.empty(shape), torch.empty(shape)).wrong


@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=8),
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=8),
)
def test_a_finding_is_wrong_exactly_where_its_share_is_too_large(a, b):
    size = min(len(a), len(b))
    found = differ(torch.tensor(a[:size]), torch.tensor(b[:size]))
    assert bool(found.wrong) == (found.share > 1)
    assert found.share >= 0


def test_a_target_may_set_its_own_limit():
    expected, got = torch.ones(4), torch.ones(4) + 100 * torch.finfo(torch.float32).eps
    assert differ(expected, got).wrong
    assert not differ(expected, got, limit=200.0).wrong


def call(ours, theirs, *args, **kwargs):
    """(what was found, what ours returned) for two functions called with the same arguments."""
    copies = _copies.Copies()
    their_args, their_kwargs = copies.of(args), copies.of(kwargs)
    expected, got = theirs(*their_args, **their_kwargs), ours(*args, **kwargs)
    return _compare.find(copies, expected, got), got


def add_in_place(x):
    x += 1


def add_in_place_and_return(x):
    x += 1
    return x


def add_in_place_and_return_a_view(x):
    x += 1
    return x.view(-1)[:3]


def add_wrongly_in_place(x):
    x += 2


PAIRS = {
    "both in place": (add_in_place, add_in_place, True),
    "both in place, wrongly": (add_wrongly_in_place, add_in_place, False),
    "ours is forgotten": (lambda x: None, add_in_place, False),
    "ours writes where theirs does not": (add_in_place, lambda x: None, False),
    # vLLM's forward_cpu: what it returns is the argument, and callers use what is returned.
    "theirs returns what it wrote to": (lambda x: x + 1, add_in_place_and_return, True),
    "theirs returns a part of it": (
        lambda x: (x + 1).view(-1)[:3],
        add_in_place_and_return_a_view,
        True,
    ),
    "theirs returns what it wrote to, ours is wrong": (
        lambda x: x + 2,
        add_in_place_and_return,
        False,
    ),
    "ours returns nothing": (lambda x: None, lambda x: x + 1, False),
    "ours returns more": (lambda x: (x, x), lambda x: (x,), False),
    "other keys": (lambda x: {"a": x}, lambda x: {"b": x}, False),
    "one of several": (lambda x: [x, {"k": (x + 1,)}], lambda x: [x, {"k": (x,)}], False),
    "all of several": (
        lambda x: [x, {"k": (x, None, 3)}],
        lambda x: [x, {"k": (x, None, 3)}],
        True,
    ),
    "a plain value": (lambda x: (x, 3), lambda x: (x, 4), False),
    "objects are not looked into": (lambda x: object(), lambda x: object(), True),
}


@pytest.mark.parametrize(("ours", "theirs", "agree"), PAIRS.values(), ids=PAIRS)
def test_what_is_returned_and_what_is_written_to_are_compared(ours, theirs, agree):
    found, _ = call(ours, theirs, torch.arange(6.0).view(2, 3))
    assert bool(found.wrong) != agree, found


def test_arguments_are_copied_wherever_they_are():
    x, y = torch.zeros(2), torch.zeros(2)

    def add(state, *, more):
        for tensor in (state["a"][0], more[1]):
            tensor += 1

    found, _ = call(add, add, {"a": (x, "text")}, more=[None, y])
    assert not found.wrong
    # Once by ours; theirs worked on copies.
    assert x.tolist() == y.tolist() == [1.0, 1.0]


def test_what_is_no_tensor_is_shared():
    layer = SimpleNamespace(table=torch.ones(2))
    copies = _copies.Copies()
    assert copies.of((layer,))[0] is layer


def test_a_tensor_that_is_passed_twice_has_one_copy():
    x = torch.ones(2)
    a, b = _copies.Copies().of((x, [x]))
    assert a is b[0]
    assert a is not x


@pytest.mark.parametrize("name", ["slice", "transposed", "expanded", "parameter"])
def test_a_copy_lies_as_the_tensor_does(name):
    base = torch.arange(24.0).view(4, 6)
    x = {
        "slice": base[:, 1:3],
        "transposed": base.t(),
        "expanded": base[:, :1].expand(4, 6),
        "parameter": torch.nn.Parameter(base),
    }[name]
    copy = _copies.Copies().of(x)
    assert torch.equal(copy, x)
    assert copy.data_ptr() != x.data_ptr()
    # No two elements of an expanded one could be written to.
    assert name == "expanded" or copy.stride() == x.stride()


def test_what_cannot_be_copied_is_said(monkeypatch):
    with pytest.raises(_copies.NotComparable, match="without data"):
        _copies.Copies().of(torch.empty(2, device="meta"))
    monkeypatch.setattr(_copies, "LARGEST_COPY", 64)
    with pytest.raises(_copies.NotComparable, match="larger than"):
        _copies.Copies().of([torch.empty(9), torch.empty(9)])


def test_results_that_are_copies_become_the_arguments():
    x = torch.zeros(3)
    copies = _copies.Copies()
    (copy,) = copies.of((x,))
    copy += 5
    fresh = torch.ones(1)
    first, second = copies.hand_over((copy, fresh))
    assert first is x
    assert second is fresh
    assert x.tolist() == [5.0, 5.0, 5.0]
