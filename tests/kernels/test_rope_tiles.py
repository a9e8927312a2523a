"""Tile sizes: every head count fits the unified buffer, grids stay small, padding stays low."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.rope import cases, tiles

HEADS = [1, 2, 3, 7, 8, 12, 28, 32, 40, 64, 96, 128, 255, 512]


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("head_size", "rotary_dim"), cases.HEADS)
def test_any_head_count_fits_the_unified_buffer(head_size, rotary_dim, itemsize, neox):
    for queries in HEADS:
        for keys in (0, 1, 8, queries):
            plan = tiles.ascend_tiles(queries, keys, head_size, rotary_dim, itemsize, neox)
            assert plan is not None
            rest = head_size - rotary_dim
            used = tiles.unified_buffer_bytes(plan, rest, itemsize, neox, True)
            assert used <= tiles.UNIFIED_BUFFER
            fused = tiles.fused_ascend_tiles(queries, keys, head_size, rotary_dim, itemsize, neox)
            assert fused is not None
            assert tiles.fused_unified_buffer_bytes(fused, itemsize, neox) <= tiles.UNIFIED_BUFFER


def test_a_head_that_does_not_fit_is_turned_down():
    assert tiles.ascend_tiles(1, 1, 2**14, 2**14, 4, True) is None


@pytest.mark.parametrize("heads", HEADS)
def test_a_tile_is_a_power_of_two_and_wastes_little(heads):
    for most in (1, 2, 8, 64, 1024):
        tile = tiles.head_tile(heads, most)
        assert tile & (tile - 1) == 0
        assert tile <= most
        padded = tile * -(-heads // tile)
        assert 4 * heads >= 3 * padded


@pytest.mark.parametrize("tokens", [0, 1, 39, 40, 41, 128, 129, 65535, 65536, 10**6])
def test_grids_cover_the_tokens_and_stay_below_the_limit(tokens):
    ascend = tiles.ascend_tiles(32, 8, 128, 128, 2, True)
    assert ascend is not None
    programs, parts = tiles.grid(ascend, tokens, 32, 8, 40)
    assert 1 <= programs <= 40
    assert parts == 1
    cuda = tiles.cuda_tiles(tokens, 64, 4, 128, 128)
    programs, parts = tiles.grid(cuda, tokens, 64, 4)
    assert not cuda.loops
    assert max(tokens, 1) == programs < 2**31
    assert parts <= 65535, "the limit of the second axis"


def test_early_tiles_are_of_one_size_and_cover_the_heads():
    plan = tiles.early_tile(tiles.cuda_tiles(64, 64, 4, 128, 128))
    assert plan.query_tile == plan.key_tile
    assert plan.split
    assert not plan.loops
    assert plan.parts(64, 4) * plan.query_tile >= 68
