"""The emulated device's backend: batches' states, metadata, and layers against a dense oracle."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm", reason="vLLM is not installed here")
pytest.importorskip("vllm.v1.attention.backend", reason="this vLLM has its backends elsewhere")

from vllm.v1.attention.backend import CommonAttentionMetadata

from ascend_patch.impl.attention_vllm_backend import (
    AscendAttentionBackend,
    AscendAttentionBackendImpl,
)
from ascend_patch.impl.attention_vllm_metadata import Speculation, state_of
from ascend_patch.kernels.npu_ops import surface

BLOCK, HEADS, KV_HEADS, HEAD = 128, 4, 2, 64
SCALE = HEAD**-0.5
MTP, EAGLE = Speculation("mtp", 3), Speculation("eagle", 3)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small, and tests beside these want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what a batch is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "options", "state"),
    [
        # No request has anything in the cache, whatever the length of its prompt.
        ([5, 9], [5, 9], {}, "prefill"),
        ([1, 1], [1, 1], {}, "prefill"),
        ([5, 9], [5, 9], {"chunked_prefill": False}, "prefill"),
        # One token each: also a prompt of which all but one were cached.
        ([1, 1], [7, 130], {}, "decode"),
        ([1, 1], [7, 1], {}, "decode"),
        ([1, 1], [7, 130], {"speculation": MTP}, "speculative"),
        ([1, 1], [7, 130], {"speculation": EAGLE}, "decode"),
        # Mixed, by what the scheduler does with prompts.
        ([1, 9], [7, 9], {}, "chunked"),
        ([4, 9], [132, 9], {}, "chunked"),
        ([9, 4], [9, 132], {}, "chunked"),
        ([4, 9], [132, 9], {"chunked_prefill": False}, "cache_hit"),
        # Drafts: one token, and up to three guesses.
        ([4, 1, 2], [40, 7, 9], {"speculation": MTP}, "speculative"),
        ([4, 4], [40, 70], {"speculation": MTP}, "speculative"),
        ([5, 4], [40, 70], {"speculation": MTP}, "chunked"),
        ([4, 4], [40, 4], {"speculation": MTP}, "chunked"),
        ([4, 4], [40, 70], {"speculation": EAGLE}, "chunked"),
        ([21, 21], [40, 70], {"speculation": Speculation("mtp", 20)}, "speculative"),
        # Requests that only pad the batch decide nothing.
        ([1, 0], [7, 0], {}, "decode"),
        ([6, 0], [6, 0], {}, "prefill"),
        ([4, 0], [40, 1], {"speculation": MTP}, "speculative"),
        ([0, 0], [0, 0], {}, "prefill"),
    ],
)
def test_a_batch_is_in_the_state_that_vllm_ascend_s_runner_gives_it(
    query_lens, seq_lens, options, state
):
    assert state_of(query_lens, seq_lens, **{"chunked_prefill": True, **options}) == state


class Unread(torch.Tensor):
    """A tensor in device memory: to look at its values is what a step must not do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in ("tolist", "item", "cpu", "to", "numpy"), (
            f"{function} reads the device"
        )
        return super().__torch_function__(function, types, args, kwargs or {})


def config(*, runner="generate", chunked=True, speculation=None) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(runner_type=runner),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        speculative_config=speculation
        and SimpleNamespace(method=speculation.method, num_speculative_tokens=speculation.tokens),
    )


def common(query_lens, seq_lens, table=None, *, padded_to=None, causal=True):
    """vLLM's metadata of a batch; what is on the device may not be read."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    count = len(query_lens)
    if table is None:
        table = torch.zeros(count, 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.as_subclass(Unread),
        query_start_loc_cpu=starts,
        seq_lens=lens.as_subclass(Unread),
        _seq_lens_cpu=lens,
        num_reqs=count,
        num_actual_tokens=padded_to or int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=table,
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        causal=causal,
    )


def build(found, settings=None):
    maker = AscendAttentionBackend.get_builder_cls()
    builder = maker(SimpleNamespace(), ["layer"], settings or config(), torch.device("cpu"))
    return builder.build(common_prefix_len=0, common_attn_metadata=found)


def test_metadata_holds_the_batch_in_the_operators_own_lists():
    table = torch.tensor([[3, 1], [2, 0], [7, 7]], dtype=torch.int32)
    found = build(common([1, 130, 4], [60, 130, 200], table))
    assert found.batch.query_ends == [1, 131, 135]
    assert found.batch.seq_lens == [60, 130, 200]
    assert torch.equal(found.batch.block_table, table)
    assert found.batch.num_tokens == 135
    assert (found.shortest, found.longest, found.longest_context) == (1, 130, 200)
    assert (found.state, found.causal, found.pooling, found.padded) == (
        "chunked", True, False, False,
    )  # fmt: skip


def test_metadata_of_a_pooling_runner_and_of_a_batch_that_is_not_causal():
    found = build(common([4, 4], [4, 4], causal=False), config(runner="pooling"))
    assert (found.pooling, found.causal) == (True, False)


def test_tokens_and_requests_that_pad_a_batch_are_noticed():
    assert build(common([4, 4], [4, 4], padded_to=16)).padded
    found = build(common([4, 0], [9, 0]))
    assert found.padded
    assert (found.shortest, found.longest) == (4, 4)


@pytest.mark.parametrize("tokens", [1, 3, 15, 16, 20])
def test_speculative_batches_of_any_length_are_built(tokens):
    """Up to 0.18 vllm-ascend asserts that no more than 16 tokens decode at once."""
    speculation = Speculation("mtp", tokens)
    query_lens = [1 + tokens, 1, 1 + tokens // 2]
    found = build(common(query_lens, [50, 60, 70]), config(speculation=speculation))
    assert found.state == "speculative"
    assert (found.shortest, found.longest) == (1, 1 + tokens)


# --- what a layer computes ---------------------------------------------------------------------


@pytest.fixture
def operators():
    """The operator surface with float32, as a float32 server has it."""
    found = surface.install("2.9.0", cann="8.5", allow=("float32",), record=True)
    yield found
    found.remove()


def caches(blocks: int, *, blocks_first: bool) -> torch.Tensor:
    """An empty cache as vLLM's runner lays it out; what nobody has written is NaN."""
    shape = AscendAttentionBackend.get_kv_cache_shape(blocks, BLOCK, KV_HEADS, HEAD)
    cache = torch.full(shape, torch.nan)
    if blocks_first:
        hidden = cache.shape[2:].numel()
        cache.as_strided_(cache.shape, (hidden, 2 * hidden, *cache.stride()[2:]))
    return cache


def dense(query, key, value, *, window=None, causal=True) -> torch.Tensor:
    """One request in float64: query [Q, Hq, D], key and value [S, Hk, D], aligned at the end."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * SCALE
    at = torch.arange(len(query))[:, None] + len(key) - len(query)
    behind = at - torch.arange(len(key))[None]
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if causal:
        hidden |= behind < 0
    if window is not None:
        hidden |= behind >= window
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


class Server:
    """Requests with blocks of a cache; each step goes through the builder and a layer."""

    def __init__(self, seed, *, requests, blocks_first=False, window=None, **settings):
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = caches(1 + 3 * requests, blocks_first=blocks_first)
        order = 1 + torch.randperm(3 * requests, generator=self.generator)
        self.table = order.view(requests, 3).to(torch.int32)
        self.keys = [torch.empty(0, KV_HEADS, HEAD) for _ in range(requests)]
        self.values = [torch.empty(0, KV_HEADS, HEAD) for _ in range(requests)]
        self.window, self.settings = window, settings
        self.layer = AscendAttentionBackendImpl(
            HEADS, HEAD, SCALE, KV_HEADS, None, window, "auto", None, "decoder"
        )

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def step(self, query_lens, *, causal=True, pad=0):
        """Run one step of the first requests; return what the layer says and what is right."""
        total = sum(query_lens)
        query = self.draw(total + pad, HEADS, HEAD)
        key, value = self.draw(total + pad, KV_HEADS, HEAD), self.draw(total + pad, KV_HEADS, HEAD)
        slots, right, start = [], [], 0
        for request, count in enumerate(query_lens):
            part, before = slice(start, start + count), len(self.keys[request])
            self.keys[request] = torch.cat([self.keys[request], key[part]])
            self.values[request] = torch.cat([self.values[request], value[part]])
            at = torch.arange(before, before + count)
            slots.append(self.table[request, at // BLOCK].long() * BLOCK + at % BLOCK)
            right.append(
                dense(query[part], self.keys[request], self.values[request],
                      window=self.window, causal=causal)
            )  # fmt: skip
            start += count
        lens = [len(self.keys[request]) for request in range(len(query_lens))]
        found = common(
            query_lens, lens, self.table[: len(lens)], padded_to=total + pad, causal=causal
        )
        metadata = build(found, config(**self.settings))
        # The padding's slots are -1.
        mapping = torch.cat([*slots, torch.full((pad,), -1)])
        self.layer.do_kv_cache_update(None, key, value, self.cache, mapping)
        # Rows behind the batch, as a graph of a fixed size has them.
        behind = torch.full((3, HEADS, HEAD), torch.nan)
        query = torch.cat([query, behind])
        out = torch.full_like(query, torch.nan)
        got = self.layer.forward(None, query, key, value, self.cache, metadata, output=out)
        assert got is out
        right.append(torch.zeros(pad + len(behind), HEADS, HEAD, dtype=torch.float64))
        return out, torch.cat(right), metadata


@pytest.mark.parametrize("blocks_first", [False, True], ids=["keys-first", "blocks-first"])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("runner", ["generate", "pooling"])
@pytest.mark.usefixtures("operators")
def test_a_request_s_life_is_attended_as_if_it_were_one_sequence(
    seed, runner, window, blocks_first
):
    server = Server(seed, requests=3, window=window, blocks_first=blocks_first, runner=runner)
    states = []
    for query_lens, pad in (
        ([130, 5, 1], 0), ([1, 1, 1], 0), ([1, 200, 40], 0), ([7, 1], 3), ([1, 1], 2),
    ):  # fmt: skip
        out, right, metadata = server.step(query_lens, pad=pad)
        states.append(metadata.state)
        torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)
    assert states == ["prefill", "decode", "chunked", "chunked", "decode"]


@pytest.mark.usefixtures("operators")
def test_attention_that_is_not_causal_sees_what_is_behind_in_the_cache_too(seed):
    server = Server(seed, requests=2)
    server.step([140, 30])
    out, right, _ = server.step([20, 50], causal=False)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("tokens", [3, 20])
def test_drafts_are_attended_causally(seed, tokens):
    server = Server(seed, requests=2, speculation=Speculation("mtp", tokens))
    server.step([140, 30])
    out, right, metadata = server.step([1 + tokens, 2])
    assert metadata.state == "speculative"
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)


def test_keys_are_read_where_another_layer_wrote_them(seed, operators):
    """A layer that shares a cache has no keys of its own, in its first step either."""
    server = Server(seed, requests=1)
    sharing = AscendAttentionBackendImpl(
        HEADS, HEAD, SCALE, KV_HEADS, None, None, "auto", None, "decoder", "model.layers.0"
    )
    _, _, metadata = server.step([9])
    query = server.draw(9, HEADS, HEAD)
    nothing = torch.full((9, KV_HEADS, HEAD), torch.nan)
    out = torch.full_like(query, torch.nan)
    sharing.forward(None, query, nothing, nothing, server.cache, metadata, output=out)
    right = dense(query, server.keys[0], server.values[0])
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)
    assert len(metadata.routes) == 2


def test_a_step_is_one_write_and_one_attention(seed, operators):
    server = Server(seed, requests=2)
    operators.calls.clear()
    server.step([5, 1])
    assert [call.operator for call in operators.calls] == [
        "atb::_npu_reshape_and_cache",
        "npu::npu_fused_infer_attention_score",
    ]


@pytest.mark.usefixtures("operators")
def test_a_warm_up_has_no_metadata_and_perhaps_no_cache(seed):
    server = Server(seed, requests=1)
    layer, key = server.layer, server.draw(4, KV_HEADS, HEAD)
    layer.do_kv_cache_update(None, key, key, torch.tensor([]), torch.zeros(4, dtype=torch.int64))
    layer.do_kv_cache_update(None, key, key, server.cache, torch.zeros(4, dtype=torch.int64))
    out = torch.full((4, HEADS, HEAD), torch.nan)
    query = server.draw(4, HEADS, HEAD)
    assert layer.forward(None, query, key, key, torch.tensor([]), None, output=out) is out
    assert not out.any()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"sliding_window": 0}, "The sliding window is 0"),
        ({"num_heads": 514}, "There are 514 query heads"),
        ({"kv_cache_dtype": "fp8"}, "The cache holds fp8"),
        # Its dtype is what layers are made in, here float32.
        ({"kv_cache_dtype": "float16"}, "The cache holds float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_no_operator_computes_says_so_before_a_request_comes(given, what):
    layer = {"num_heads": HEADS, "head_size": HEAD, "scale": SCALE, "num_kv_heads": KV_HEADS}
    with pytest.raises(NotImplementedError, match=f"{what}.*without ASCEND_PATCHES_DEVICE"):
        AscendAttentionBackendImpl(**{**layer, **given})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cache_may_be_asked_for_in_the_model_s_own_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        name = str(dtype).removeprefix("torch.")
        layer = AscendAttentionBackendImpl(HEADS, HEAD, SCALE, KV_HEADS, kv_cache_dtype=name)
    finally:
        torch.set_default_dtype(before)
    assert layer.kv_cache_dtype == name
