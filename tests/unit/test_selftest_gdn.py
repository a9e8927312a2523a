"""patch_gdn_attn's self-test: it passes kernels that are right, and withdraws one that is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from ascend_patch import _selftest  # noqa: E402
from ascend_patch.impl import gdn_selftest  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.gdn import chunk, conv, gating, reference  # noqa: E402

OPERATORS = (chunk.OPERATOR, conv.OPERATOR, gating.OPERATOR)


class Layer(nn.Module):
    """What the self-test reads of vLLM's layer; two ranks share its heads."""

    def __init__(self, dtype=torch.bfloat16, device="cpu") -> None:
        super().__init__()
        self.num_k_heads, self.num_v_heads, self.tp_size = 4, 8, 2
        self.head_k_dim, self.head_v_dim = 64, 128
        channels = (2 * 4 * 64 + 8 * 128) // 2
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.empty(channels, 1, 4, dtype=dtype, device=device))
        self.A_log = nn.Parameter(torch.empty(4, device=device))

    def get_state_dtype(self):
        return torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(gdn_selftest, "_tried", set())
    torch.set_num_threads(1)


def model(*layers):
    return SimpleNamespace(modules=lambda: iter(layers))


def cases(*layers):
    return gdn_selftest.cases(model(*layers), lambda: None)


def test_a_layer_is_seen_as_its_rank_has_it():
    (found,) = gdn_selftest.layers(model(Layer(), nn.Linear(3, 3), Layer(device="meta")))
    assert (found.key_heads, found.value_heads) == (2, 4)
    assert (found.key_size, found.value_size, found.kernel) == (64, 128, 4)
    assert (found.dtype, found.state_dtype) == (torch.bfloat16, torch.float32)
    assert str(found) == "bfloat16, heads 2:4 of 64:128"


def test_layers_that_look_alike_are_tried_once_and_what_is_right_passes():
    made = cases(Layer(), Layer())
    assert len(made) == 7
    assert cases(Layer()) == []
    result = _selftest.run(made)
    print(result.sentence())
    assert result.wrong == ""
    assert (result.cases, result.withdrawn) == (7, ())
    assert 0 < result.share < 1


def test_defaults_of_the_loader_are_not_what_inputs_are_drawn_in():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            result = _selftest.run(cases(Layer(device="cpu")))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (result.cases, result.wrong) == (7, "")


def spoilt(run, field):
    def wrong(call):
        run(call)
        getattr(call, field).mul_(1.03)

    return wrong


@pytest.mark.parametrize("field", ["out", "final"])
def test_a_kernel_that_is_off_by_three_percent_is_withdrawn_and_the_next_one_serves(field):
    dispatch.register(
        chunk.OPERATOR,
        "cpu",
        dispatch.Implementation("spoilt", spoilt(reference.run, field), priority=9),
    )
    try:
        result = _selftest.run(cases(Layer()))
        print(result.sentence())
        assert result.wrong == ""
        (withdrawn,) = result.withdrawn
        assert withdrawn.startswith("chunk_gated_delta_rule by spoilt on cpu (")
        assert [i.name for i in dispatch.candidates(chunk.OPERATOR, "cpu")] == ["reference"]
    finally:
        dispatch.unregister(chunk.OPERATOR, "cpu", "spoilt")


def test_a_reference_that_is_wrong_fails_the_patch(monkeypatch):
    """On a CPU nothing else computes a layer."""
    right = dispatch.candidates(conv.OPERATOR, "cpu")[0]

    def wrong(call):
        right.run(call)
        call.conv_state[1] += 1

    broken = dispatch.Implementation("reference", wrong)
    dispatch.register(conv.OPERATOR, dispatch.ANY_DEVICE, broken)
    try:
        result = _selftest.run(cases(Layer()))
        assert "conv_state is not the last inputs of each sequence" in result.wrong
        assert result.withdrawn == ()
    finally:
        dispatch.register(conv.OPERATOR, dispatch.ANY_DEVICE, right)


def test_what_is_offered_and_never_tried_does_not_stay(monkeypatch):
    def offer(device):
        dispatch.register(
            chunk.OPERATOR,
            device,
            dispatch.Implementation("no taker", reference.run, lambda call: (False, "no")),
        )
        return [(chunk.OPERATOR, "no taker")]

    monkeypatch.setattr(gdn_selftest.selftest, "offer", offer)
    cases(Layer())
    assert [i.name for i in dispatch.candidates(chunk.OPERATOR, "cpu")] == ["reference"]
