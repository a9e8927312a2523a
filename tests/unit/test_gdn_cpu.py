"""What stands in for Triton in a CPU server: bytes that are moved, batches that are told apart."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ascend_patch.impl import gdn_cpu, gdn_metadata


def never(*args: object, **kwargs: object) -> None:
    pytest.fail("the release's own code ran")


class Noted:
    """A callable that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict]] = []

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.calls.append((args, kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_zeroed_and_no_others(dtype) -> None:
    """Two segments, as keys before values lie, of blocks of 24 elements."""
    cache = torch.ones(2, 5, 24, dtype=dtype)
    size = cache.element_size()
    meta = torch.tensor([cache[i].data_ptr() for i in range(2)], dtype=torch.uint64)
    zeroer = SimpleNamespace(_meta=(meta, 24 * size // 4, 4, 2))
    gdn_cpu.zero_block_ids(never, zeroer, ([3, 0],), {})
    expected = torch.ones_like(cache)
    expected[:, [0, 3]] = 0
    assert torch.equal(cache, expected)


def test_zeroing_without_attention_layers_or_blocks() -> None:
    gdn_cpu.zero_block_ids(never, SimpleNamespace(_meta=None), ([1],), {})
    gdn_cpu.zero_block_ids(never, SimpleNamespace(_meta=(None, 1, 1, 1)), (), {"block_ids": []})


def test_states_are_copied_byte_by_byte() -> None:
    states = torch.arange(30, dtype=torch.float32).view(5, 6)
    before = states.clone()
    sources = torch.tensor([states[1].data_ptr(), states[4, 2:].data_ptr()])
    targets = torch.tensor([states[3].data_ptr(), states[0].data_ptr()])
    sizes = torch.tensor([6 * 4, 4 * 4], dtype=torch.int32)
    gdn_cpu.batch_memcpy(never, None, (sources, targets, sizes), {})
    before[3], before[0, :4] = before[1], before[4, 2:]
    assert torch.equal(states, before)


def test_a_copy_onto_itself_moves_what_was_there() -> None:
    """The inputs of a convolution are moved on within their slot."""
    state = torch.arange(8, dtype=torch.int32)
    addresses = [torch.tensor([state[i:].data_ptr()]) for i in (0, 2)]
    gdn_cpu.batch_memcpy(never, None, (*addresses, torch.tensor([6 * 4])), {})
    assert state.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("shape", "packs"), [((8, 4), True), ((8, 1, 4), False)])
def test_only_matrices_are_packed(shape, packs) -> None:
    layer, release = SimpleNamespace(weight=torch.ones(shape)), Noted()
    gdn_cpu.dispatch_cpu_unquantized_gemm(release, None, (layer,), {"remove_weight": True})
    assert release.calls == [((layer,), {"remove_weight": True})] * packs
    assert layer.weight.shape == shape
    assert hasattr(layer, "cpu_linear") == (not packs)


def test_layers_that_another_rank_has_are_the_releases_own_business() -> None:
    layer, release = SimpleNamespace(weight=torch.ones(8, 1, 4, device="meta")), Noted()
    gdn_cpu.dispatch_cpu_unquantized_gemm(release, None, (layer, True), {})
    assert len(release.calls) == 1


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The block sizes for which vLLM's own hybrid configuration was asked for pages."""
    found: list[int] = []
    module = ModuleType("vllm.model_executor.models.config")

    class HybridAttentionMambaModelConfig:
        @staticmethod
        def verify_and_update_config(config: SimpleNamespace) -> None:
            found.append(config.cache_config.block_size)

    module.HybridAttentionMambaModelConfig = HybridAttentionMambaModelConfig
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def config_of(block_size: int, *, hybrid: bool = True, asked_for: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=hybrid),
        cache_config=SimpleNamespace(block_size=block_size, user_specified_block_size=asked_for),
    )


def reset(vllm_config: SimpleNamespace) -> None:
    """What CpuPlatform does to the block size."""
    if not vllm_config.cache_config.user_specified_block_size:
        vllm_config.cache_config.block_size = 128


@pytest.mark.parametrize(("needed", "block"), [(16, 128), (80, 128), (128, 128), (129, 256)])
def test_a_hybrid_model_keeps_a_block_that_holds_a_state(asked, needed, block) -> None:
    config = config_of(needed)
    gdn_cpu.check_and_update_config(reset, None, (config,), {})
    assert config.cache_config.block_size == block
    assert asked == [block]


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (config_of(16, hybrid=False), 128),
        (config_of(96, asked_for=True), 96),
        (SimpleNamespace(model_config=None, cache_config=config_of(16).cache_config), 128),
    ],
    ids=["no-hybrid", "asked-for", "no-model"],
)
def test_other_block_sizes_are_the_platforms(asked, config, block) -> None:
    gdn_cpu.check_and_update_config(reset, None, (), {"vllm_config": config})
    assert config.cache_config.block_size == block
    assert not asked


def batch(computed: list[int], lengths: list[int]) -> tuple[SimpleNamespace, SimpleNamespace]:
    """vLLM's common metadata, and what its builder makes of it without drafts."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    decode = all(length == 1 for length in lengths)
    count, tokens = len(lengths), sum(lengths)
    metadata = SimpleNamespace(
        num_prefills=0 if decode else count,
        num_prefill_tokens=0 if decode else tokens,
        num_decodes=count if decode else 0,
        num_decode_tokens=tokens if decode else 0,
        has_initial_state=None if decode else torch.tensor(computed) > 0,
        spec_sequence_masks=None,
        non_spec_query_start_loc=starts,
    )
    common = SimpleNamespace(compute_num_computed_tokens=lambda: torch.tensor(computed))
    return common, metadata


def built(computed: list[int], lengths: list[int]) -> SimpleNamespace:
    common, metadata = batch(computed, lengths)
    found = gdn_cpu.build(
        lambda *_, **__: metadata, object(), (0,), {"common_attn_metadata": common}
    )
    assert found is metadata
    return found


def test_a_prompt_of_one_token_is_no_decode() -> None:
    metadata = built([7, 0, 3], [1, 1, 1])
    assert (metadata.num_prefills, metadata.num_prefill_tokens) == (3, 3)
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (0, 0)
    assert metadata.has_initial_state.tolist() == [True, False, True]
    chunks = gdn_metadata.of(metadata)
    assert chunks is not None
    assert chunks.starts == (0, 1, 2, 3)


def test_decode_stays_decode() -> None:
    metadata = built([7, 1], [1, 1])
    assert (metadata.num_prefills, metadata.num_decodes) == (0, 2)
    assert metadata.has_initial_state is None
    assert gdn_metadata.of(metadata) is None


def test_prefill_gets_its_tables() -> None:
    metadata = built([7, 0], [1, 70])
    chunks = gdn_metadata.of(metadata)
    assert chunks is not None
    assert chunks.starts == (0, 1, 71)
