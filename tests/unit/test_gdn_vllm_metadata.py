"""Chunk tables on a host's metadata: of which sequences, and from whose memory."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.impl import gdn_metadata  # noqa: E402
from ascend_patch.impl.gdn_vllm_parcel import Parcel  # noqa: E402
from ascend_patch.kernels.gdn import PinnedStaging  # noqa: E402

CPU = torch.device("cpu")


class Builder:
    """Anything that a builder's buffers can hang on."""


class Late:
    """A device that reads the host's memory only when `catch_up` says so."""

    def __init__(self) -> None:
        self.waiting: list = []

    def allocate(self, elements: int) -> torch.Tensor:
        return torch.full((elements,), -7, dtype=torch.int32)

    def send(self, host: torch.Tensor):
        there = torch.full_like(host, -9)
        event = SimpleNamespace(done=False)
        event.query = lambda: event.done
        self.waiting.append((host, there, event))
        return there, event

    def catch_up(self) -> None:
        for host, there, event in self.waiting:
            there.copy_(host)
            event.done = True
        self.waiting.clear()


@pytest.fixture
def late(monkeypatch):
    """A builder whose copies go to a late device, and that device."""
    builder, device = Builder(), Late()
    staging = PinnedStaging(CPU, transfer=device)
    monkeypatch.setattr(gdn_metadata, "staging_of", lambda b, d: staging)
    # The tables' builder takes a CPU for a device that needs no copies.
    return builder, device, SimpleNamespace(type="late")


def starts_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        (None, None),
        ([-1, -1], None),
        # Requests that may draft and have no drafts make no speculative batch,
        ([0, 0, -1], None),
        # and are part of one.
        ([0, 3, -1], [True, True, False]),
        ([-1, 3, -1, -1], [False, True, False, False]),
    ],
)
def test_drafting(drafts, expected):
    given = None if drafts is None else torch.tensor(drafts, dtype=torch.int32)
    found = gdn_metadata.drafting(given)
    assert (None if found is None else found.tolist()) == expected
    assert gdn_metadata.drafting(given, use_spec_decode=False) is None


def test_non_speculative_sequences_keep_their_order_and_the_empty_ones():
    starts = starts_of(4, 4, 0, 8, 0)
    assert gdn_metadata.non_speculative(starts, None) is starts
    mask = torch.tensor([False, True, False, False, False])
    assert gdn_metadata.non_speculative(starts, mask).tolist() == [0, 4, 4, 12, 12]
    assert gdn_metadata.non_speculative(starts, ~mask).tolist() == [0, 4]


def test_attach_without_prefill_leaves_nothing_of_before():
    metadata = SimpleNamespace(num_prefills=1)
    gdn_metadata.attach(metadata, Builder(), starts_of(3), CPU)
    assert gdn_metadata.of(metadata).starts == (0, 3)
    metadata.num_prefills = 0
    assert gdn_metadata.attach(metadata, Builder(), starts_of(1, 1), CPU) is None
    assert gdn_metadata.of(metadata) is None
    assert gdn_metadata.of(SimpleNamespace()) is None


def test_starts_that_fall_are_the_release_s_and_counted(monkeypatch):
    counted = []
    monkeypatch.setattr(gdn_metadata.left_to_host, "count", lambda *of: counted.append(of))
    metadata = SimpleNamespace(num_prefills=1)
    falling = torch.tensor([0, 8, 3], dtype=torch.int32)
    assert gdn_metadata.attach(metadata, Builder(), falling, CPU) is None
    ((patch, note),) = counted
    assert patch == "gdn_attn"
    assert "must begin with 0 and never fall" in note


def test_builds_that_the_device_has_not_read_yet_stay_whole(late, seed):
    """Several of one builder in a step, ubatches, a dummy run: each keeps its own memory."""
    builder, device, where = late
    generator = torch.Generator().manual_seed(seed)
    lengths = [
        torch.randint(0, 300, (n,), generator=generator).tolist() for n in (1, 40, 3, 500, 7, 2)
    ]
    # The runner's own buffer, which the next step is written to.
    buffer = torch.zeros(600, dtype=torch.int32)
    built = []
    for one in lengths:
        starts = starts_of(*one)
        buffer.fill_(12345)
        buffer[: len(starts)] = starts
        metadata = SimpleNamespace(num_prefills=1)
        gdn_metadata.attach(metadata, builder, buffer[: len(starts)], where)
        built.append((starts.tolist(), gdn_metadata.of(metadata)))
    buffer.fill_(54321)
    assert all(-9 in chunks.cu_seqlens.tolist() for _, chunks in built), "the device was not late"
    device.catch_up()
    for starts, chunks in built:
        assert list(chunks.starts) == starts
        assert chunks.cu_seqlens.tolist() == starts
        assert chunks.table(64).offsets[-1] == len(chunks.table(64).indices)


def test_buffers_are_a_builder_s_own_and_go_with_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        gdn_metadata, "PinnedStaging", lambda device: made.append(device) or object()
    )
    one, other, device = Builder(), Builder(), torch.device("cuda", 0)
    found = gdn_metadata.staging_of(one, device)
    assert gdn_metadata.staging_of(one, device) is found
    assert gdn_metadata.staging_of(other, device) is not found
    assert made == [device, device]
    assert gdn_metadata.staging_of(one, CPU) is None
    before = len(gdn_metadata._staging)
    del one, found
    gc.collect()
    assert len(gdn_metadata._staging) == before - 1


def test_a_parcel_is_one_copy_of_all_its_arrays(seed):
    import numpy as np

    random = np.random.default_rng(seed)
    arrays = [
        random.integers(-(2**31), 2**31 - 1, 5, dtype=np.int32),
        random.integers(-(2**62), 2**62, (3, 2), dtype=np.int64),
        random.integers(0, 2, 7).astype(bool),
        np.zeros(0, dtype=np.int64),
        random.integers(0, 9, 20, dtype=np.int32)[::2],
    ]
    device = Late()
    staging = PinnedStaging(CPU, transfer=device)
    parcel = Parcel()
    assert [parcel.put(array) for array in arrays] == [0, 1, 2, 3, 4]
    sent = parcel.send(CPU, staging)
    assert len(device.waiting) == 1
    device.catch_up()
    plain = parcel.send(CPU, None)
    for array, *tensors in zip(arrays, sent, plain, strict=True):
        for tensor in tensors:
            assert tensor.numpy().dtype == array.dtype
            assert np.array_equal(tensor.numpy(), array)
    with pytest.raises(TypeError, match="int32, int64 and bool"):
        parcel.put(np.zeros(2))
    empty = Parcel()
    empty.put(np.zeros(0, dtype=np.int32))
    assert empty.send(CPU, staging)[0].shape == (0,)
