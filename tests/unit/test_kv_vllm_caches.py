"""How caches lie in memory, told from tensors alone."""

from __future__ import annotations

from typing import Any

import pytest

from ascend_patch.impl import kv_vllm_caches
from ascend_patch.impl.kv_vllm_caches import CacheError

torch = pytest.importorskip("torch", reason="torch is not installed here")

N, B, H, D = 6, 16, 4, 8


def cpu(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    return 2, num_blocks, num_kv_heads, block_size, head_size


def flash(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    return 2, num_blocks, block_size, num_kv_heads, head_size


def flashinfer(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    return num_blocks, 2, block_size, num_kv_heads, head_size


def latent(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    return num_blocks, block_size, head_size


def read(shape: Any, caches: Any, **more: Any) -> Any:
    given = {"block_size": B, "mla": False, "split": True} | more
    return kv_vllm_caches.read({f"layer.{i}": c for i, c in enumerate(caches)}, shape, **given)


def fresh(shape: Any, transposed: bool = False, count: int = 2) -> list[Any]:
    """Two layers, each element another number; or the same as a view of the other layout."""
    size = list(shape(num_blocks=N, block_size=B, num_kv_heads=H, head_size=D))
    if transposed:
        size[-3], size[-2] = size[-2], size[-3]
    found = [torch.arange(torch.Size(size).numel()).view(size) + 1e6 * i for i in range(count)]
    return [cache.transpose(-3, -2) for cache in found] if transposed else found


@pytest.mark.parametrize(
    ("shape", "transposed", "split", "layout"),
    [
        (cpu, False, True, "HND"),
        (flash, False, True, "NHD"),
        (flash, True, True, "HND"),
        (cpu, True, True, "NHD"),
        (flashinfer, False, False, "NHD"),
        (flashinfer, True, False, "HND"),
    ],
)
def test_layouts_are_those_of_the_memory(shape, transposed, split, layout) -> None:
    layers = fresh(shape, transposed)
    caches = read(shape, layers, split=split)
    assert (caches.layout, caches.combined) == (layout, not split)
    assert (caches.num_blocks, caches.heads, caches.head_size) == (N, H, D)
    assert len(caches.regions) == 2 * (1 + split)
    assert caches.block_bytes == B * H * D * 4 * (1 if split else 2)
    kv = shape(num_blocks=N, block_size=B, num_kv_heads=H, head_size=D).index(2)
    head = shape is cpu
    for number, region in enumerate(caches.regions):
        cache = layers[number // 2 if split else number]
        part = cache.select(kv, number % 2) if split else cache
        logical = part.transpose(-3, -2) if head else part
        assert torch.equal(region.view, logical)
        # Block 1 of a region is where a push would write it.
        assert region.address == part.data_ptr()
        assert region.view[1].data_ptr() == region.address + caches.block_bytes
    side = caches.side(total_kv_heads=2 * H, tp=2, mla=False, block_size=B)
    assert side.regions(0) == (caches.block_bytes,) * len(caches.regions)


def test_latents_are_one_head_that_every_rank_holds() -> None:
    caches = read(latent, fresh(latent), mla=True, split=False)
    side = caches.side(total_kv_heads=1, tp=8, mla=True, block_size=B)
    assert side.groups[0].widths == (D,)
    assert side.regions(3) == (B * D * 4,) * 2


def test_layers_that_share_a_cache_are_one_region() -> None:
    (layer,) = fresh(flash, count=1)
    assert len(read(flash, [layer, layer]).regions) == 2


@pytest.mark.parametrize(
    ("caches", "more", "sentence"),
    [
        (lambda: fresh(flash), {"block_size": 128}, "blocks of 16 tokens, and the scheduler 128"),
        (lambda: [c[..., ::2] for c in fresh(flash)], {}, "not a row of whole blocks"),
        (lambda: [c[:, ::2] for c in fresh(flash)], {}, "not a row of whole blocks"),
        (lambda: [fresh(flash)[0], fresh(flash)[0].bfloat16()], {}, "different shapes or layouts"),
        (lambda: fresh(latent), {}, "its backend's shapes are like"),
    ],
)
def test_what_cannot_be_moved_is_a_sentence(caches, more, sentence) -> None:
    with pytest.raises(CacheError, match=sentence):
        read(flash, caches(), **more)


def test_a_shape_that_says_nothing_is_a_sentence() -> None:
    with pytest.raises(CacheError, match="is none that is understood"):
        read(lambda **_: (2, 16, 16, 16, 16), fresh(flash))


def test_heads_that_are_not_the_model_s_are_a_sentence() -> None:
    with pytest.raises(CacheError, match="several kinds of cache"):
        read(flash, fresh(flash)).side(total_kv_heads=H, tp=2, mla=False, block_size=B)
