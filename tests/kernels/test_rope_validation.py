"""Calls that rotary_embedding refuses, and the checked mode."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import rope  # noqa: E402
from ascend_patch.kernels.rope import checks  # noqa: E402

T, D = 5, 64


def call(operation=rope.rotary_embedding, **changes):
    arguments = {
        "positions": torch.arange(T),
        "query": torch.zeros(T, 4 * D),
        "key": torch.zeros(T, 2 * D),
        "cos_sin_cache": torch.zeros(16, D),
        "head_size": D,
        "is_neox_style": True,
        **changes,
    }
    return operation(**arguments)


REFUSED = [
    ({"cos_sin_cache": torch.zeros(16)}, ValueError, "must be .max_position, rotary_dim."),
    ({"cos_sin_cache": torch.zeros(1, 16, D)}, ValueError, "3 dimensions"),
    ({"cos_sin_cache": torch.zeros(16, 63)}, ValueError, "must be even"),
    ({"cos_sin_cache": torch.zeros(16, 0)}, ValueError, "must be even and positive"),
    ({"cos_sin_cache": torch.zeros(16, 80)}, ValueError, "more than head_size 64"),
    ({"cos_sin_cache": torch.zeros(0, D)}, ValueError, "no rows"),
    ({"cos_sin_cache": torch.zeros(16, D, dtype=torch.int32)}, TypeError, "floating point"),
    ({"query": torch.zeros(T, 100)}, ValueError, "query is 100 wide"),
    ({"query": torch.zeros(T, 4, 32)}, ValueError, "query must be"),
    ({"query": torch.zeros(T * D)}, ValueError, "query must be"),
    ({"query": torch.zeros(4, 4 * D)}, ValueError, "query has 4 tokens, but positions are for 5"),
    ({"query": torch.zeros(T, 4 * D, dtype=torch.float64)}, TypeError, "query must be bfloat16"),
    ({"key": torch.zeros(T, 100)}, ValueError, "key is 100 wide"),
    ({"key": torch.zeros(6, 2 * D)}, ValueError, "key has 6 tokens"),
    ({"key": torch.zeros(T, D, dtype=torch.bfloat16)}, TypeError, "key must have the dtype"),
    ({"positions": torch.zeros(T)}, TypeError, "positions must be int32 or int64"),
    ({"positions": torch.zeros(3, T, dtype=torch.int64)}, ValueError, "positions are for 15"),
    ({"mrope_section": [16, 16, 16]}, ValueError, "sums to 48, but it must cover"),
    ({"mrope_section": [16, 16]}, ValueError, "three sizes"),
    ({"mrope_section": [40, -4, -4]}, ValueError, "none negative"),
    (
        {"mrope_section": [16, 8, 8], "positions": torch.zeros(2, T, dtype=torch.int64)},
        ValueError,
        r"must be \[3, T\]",
    ),
    (
        {"mrope_section": [16, 8, 8], "positions": torch.zeros(3, 4, dtype=torch.int64)},
        ValueError,
        "positions are for 4",
    ),
    ({"cos_sin_cache": torch.zeros(16, D, device="meta")}, ValueError, "cos_sin_cache is on meta"),
]


@pytest.mark.parametrize("operation", [rope.rotary_embedding, rope.rotary_embedding_])
@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses_in_a_sentence(operation, changes, error, words):
    with pytest.raises(error, match=words) as caught:
        call(operation, **changes)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("bad", [[-1, 0, 1, 2, 3], [0, 1, 2, 3, 16]])
def test_checked_mode_refuses_positions_outside_the_cache(bad, monkeypatch):
    positions = torch.tensor(bad)
    call(positions=positions)
    with pytest.raises(ValueError, match=r"rows for 0 to 15; build the cache"):
        call(positions=positions, check=True)
    monkeypatch.setenv(checks.CHECK_VARIABLE, "1")
    with pytest.raises(ValueError, match=f"from {min(bad)} to {max(bad)}"):
        call(positions=positions)
    query = torch.ones(T, D)
    with pytest.raises(ValueError, match="positions run"):
        call(rope.rotary_embedding_, positions=positions, query=query)
    assert (query == 1).all(), "refused, and yet changed"
    call(positions=positions, check=False)


def test_checked_mode_accepts_what_is_right(monkeypatch):
    monkeypatch.setenv(checks.CHECK_VARIABLE, "1")
    call()
    empty = torch.zeros(0, D)
    call(positions=torch.zeros(0, dtype=torch.int64), query=empty, key=empty)
    monkeypatch.setenv(checks.CHECK_VARIABLE, "0")
    call(positions=torch.full((T,), 99))


def test_checked_mode_still_validates_shapes_first():
    with pytest.raises(ValueError, match="max_position, rotary_dim"):
        call(cos_sin_cache=torch.tensor(1.0), check=True)


def test_checked_mode_reads_nothing_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
    call(positions=torch.full((T,), 99), check=True)


@pytest.mark.parametrize(
    ("x", "cos", "words"),
    [
        (torch.zeros(4, 64), torch.zeros(4, 32), "x must be"),
        (torch.zeros(4, 2, 64), torch.zeros(5, 32), "cos and sin must be .s, rotary_dim/2."),
        (torch.zeros(4, 2, 64), torch.zeros(32), "cos and sin must be"),
        (torch.zeros(2, 4, 2, 64), torch.zeros(3, 4, 32), "cos and sin must be"),
        (torch.zeros(4, 2, 64), torch.zeros(4, 33), "rotate 66 elements"),
    ],
)
def test_apply_rotary_refuses(x, cos, words):
    with pytest.raises(ValueError, match=words):
        rope.apply_rotary(x, cos, cos, is_neox_style=True)


def test_apply_rotary_refuses_dtypes_and_unequal_angles():
    x, angle = torch.zeros(4, 2, 64), torch.zeros(4, 32)
    with pytest.raises(TypeError, match="x must be"):
        rope.apply_rotary(x.double(), angle, angle, is_neox_style=True)
    with pytest.raises(TypeError, match="floating point"):
        rope.apply_rotary(x, angle.int(), angle, is_neox_style=True)
    with pytest.raises(ValueError, match="one shape"):
        rope.apply_rotary(x, angle, angle[:3], is_neox_style=True)
