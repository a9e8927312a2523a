"""How vLLM's KV caches lie in memory: read from the tensors, not from what a backend says of them.

vLLM's CPU backend says NHD and stores HND; FlashAttention's caches change with VLLM_KV_CACHE_LAYOUT
and keep their shape. So the dimensions are told apart by a mock shape, and the layout by strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ascend_patch.kernels.kv_layout import HND, NHD, LayerGroup, Side

# All different, and nothing that a backend rounds: which dimension is which is seen in its shape.
MOCK = {"num_blocks": 1013, "block_size": 176, "num_kv_heads": 3, "head_size": 64}


class CacheError(RuntimeError):
    """Caches that cannot be transferred; the message says what was found."""


@dataclass(frozen=True)
class Region:
    """A piece of memory of equal blocks.

    Attributes:
        view: [num_blocks, tokens, heads, elements], with 2 for K and V behind the blocks where
            it has both; for latents [num_blocks, tokens, elements].
    """

    address: int
    nbytes: int
    view: Any


@dataclass(frozen=True)
class Caches:
    """What a worker's caches are.

    Attributes:
        regions: In the order in which vLLM's connector registers them.
        combined: A region has K and V.
    """

    regions: tuple[Region, ...]
    num_blocks: int
    layout: str
    combined: bool
    head_size: int
    heads: int
    itemsize: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in a region."""
        return self.regions[0].nbytes // self.num_blocks

    def side(self, *, total_kv_heads: int, tp: int, mla: bool, block_size: int) -> Side:
        """How this server cuts the model, for a plan."""
        each = 1 if self.combined or mla else 2
        widths = (self.head_size,) if mla else (self.head_size, self.head_size)
        heads = 1 if mla else total_kv_heads
        group = LayerGroup(len(self.regions) // each, heads, widths)
        side = Side(
            (group,),
            tp,
            block_size=block_size,
            layout=self.layout,
            combined=self.combined,
            dtype=self.dtype,
            itemsize=self.itemsize,
        )
        expected = side.regions(0)
        if set(expected) != {self.block_bytes} or len(expected) != len(self.regions):
            raise CacheError(
                f"A block of these caches is {self.block_bytes} bytes in {len(self.regions)} "
                f"regions; {heads} KV heads of {widths} elements on {tp} ranks should give "
                f"{sorted(set(expected))} in {len(expected)}. Models with several kinds of cache "
                "are not transferred."
            )
        return side


def read(
    kv_caches: Mapping[str, Any], shape_of: Any, *, block_size: int, mla: bool, split: bool
) -> Caches:
    """Look at the caches that vLLM hands to register_kv_caches.

    Args:
        kv_caches: Layer name -> tensor; layers may share one.
        shape_of: The attention backend's get_kv_cache_shape.
        block_size: Tokens of a block, as the scheduler counts them.
        mla: The caches are latents, [num_blocks, block_size, width].
        split: K and V come first in the shape, and are registered apart.

    Raises:
        CacheError: Caches of several shapes, blocks that are no whole pieces of memory, or another
            block size in the kernel than in the scheduler.
    """
    mock = tuple(shape_of(**MOCK))
    regions: dict[int, Region] = {}
    found: set[tuple[Any, ...]] = set()
    for name, cache in kv_caches.items():
        if len(cache.shape) != len(mock):
            raise CacheError(
                f"The cache of {name} is {tuple(cache.shape)}; its backend's shapes are like {mock}"
            )
        dims = _dimensions(mock, mla)
        if cache.shape[dims["token"]] != block_size:
            raise CacheError(
                f"The cache of {name} has blocks of {cache.shape[dims['token']]} tokens, and the "
                f"scheduler {block_size}; set --block-size to what the attention backend takes."
            )
        found.add(_facts(name, cache, dims, mla, split))
        order = [dims[one] for one in ("kv", "block", "token", "head", "element") if one in dims]
        whole = cache.permute(order)
        for part in whole if split else (whole if mla else whole.transpose(0, 1),):
            regions.setdefault(part.data_ptr(), Region(part.data_ptr(), part.nbytes, part))
    if len(found) != 1:
        raise CacheError(
            "The model's layers have caches of different shapes or layouts, which are not "
            f"transferred: {sorted(map(str, found))}"
        )
    return Caches(tuple(regions.values()), *found.pop())


def _dimensions(mock: tuple[int, ...], mla: bool) -> dict[str, int]:
    wanted = {"block": MOCK["num_blocks"], "token": MOCK["block_size"]}
    if not mla:
        wanted |= {"kv": 2, "head": MOCK["num_kv_heads"], "element": MOCK["head_size"]}
    try:
        found = {name: mock.index(value) for name, value in wanted.items()}
    except ValueError:
        found = {}
    if len(found) != len(mock) - mla:
        raise CacheError(
            f"The attention backend's cache shape, {mock} for {MOCK}, is none that is understood."
        )
    return found | ({"element": 2} if mla else {})


def _facts(
    name: str, cache: Any, dims: Mapping[str, int], mla: bool, split: bool
) -> tuple[Any, ...]:
    size = {one: cache.shape[dim] for one, dim in dims.items()}
    stride = {one: cache.stride(dim) for one, dim in dims.items()}
    heads = size.get("head", 1)
    hnd = not mla and stride["head"] > stride["token"]
    # From the innermost: what a block holds must lie together, and blocks behind each other.
    order = ["element", "token", "head"] if hnd else ["element", "head", "token"]
    order = [one for one in order if one in size] + ["kv"] * (not (mla or split)) + ["block"]
    expected, step = {}, 1
    for one in order:
        expected[one], step = step, step * size[one]
    wrong = [one for one in order if size[one] > 1 and stride[one] != expected[one]]
    if wrong:
        raise CacheError(
            f"The cache of {name}, {tuple(cache.shape)} with strides {tuple(cache.stride())}, is "
            f"not a row of whole blocks: the strides of {', '.join(wrong)} should be "
            f"{[expected[one] for one in wrong]}."
        )
    layout = HND if hnd else NHD
    facts = (size["block"], layout, not (mla or split), size["element"], heads)
    return (*facts, cache.element_size(), str(cache.dtype).removeprefix("torch."))
