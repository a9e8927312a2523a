"""patch_rotary's self-test with kernels that are wrong, and those that wait for it."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rotary_model import Attention, Rotary, model, names, run  # noqa: E402

from ascend_patch.impl import rotary_selftest  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.rope import ops, selftest, triton_call  # noqa: E402

BYTES = 8 << 20
ROTARY, FUSED, ANGLES = "rotary_embedding", "split_qkv_rmsnorm_rope", "apply_rotary"


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    monkeypatch.setattr(rotary_selftest, "_tried", set())


@pytest.fixture(autouse=True)
def _table_as_before():
    before = dict(dispatch._table)
    yield
    dispatch._table.clear()
    dispatch._table.update(before)


def perturbed(call_of, by):
    """An implementation whose first output is off."""

    def wrong(*call):
        call_of(*call)
        out = call[0]
        if out.numel():
            by(out)

    return wrong


def negate_one(out):
    out.view(-1)[out.numel() // 2] *= -1


def off_by_two_percent(out):
    out *= 1.02


def poison(out):
    out.view(-1)[-1] = float("nan")


FAULTS = pytest.mark.parametrize("fault", [negate_one, off_by_two_percent, poison])


def implementation(operator, name="reference"):
    return next(i for i in dispatch.candidates(operator, "cpu") if i.name == name)


@FAULTS
def test_a_wrong_kernel_is_withdrawn_and_the_reference_serves(fault):
    real = implementation(ROTARY)
    wrong = dispatch.Implementation("triton", perturbed(real.run, fault), priority=10)
    dispatch.register(ROTARY, "cpu", wrong)
    result = run(model(Attention(Rotary(dtype=torch.float32))))
    assert not result.wrong
    assert (
        "rotary_embedding by triton on cpu (rotary_embedding, Rotary, neox, float32"
        in (result.withdrawn[0])
    )
    assert [i.name for i in dispatch.candidates(ROTARY, "cpu")] == ["reference"]
    assert result.cases == 4


@FAULTS
def test_where_the_last_kernel_is_wrong_there_is_a_sentence_for_it(fault):
    real = implementation(ROTARY)
    off = dataclasses.replace(real, run=perturbed(real.run, fault))
    dispatch.register(ROTARY, dispatch.ANY_DEVICE, off)
    result = run(model(Attention(Rotary())))
    assert "rotary_embedding, Rotary, neox, bfloat16, heads 4:2 of 64" in result.wrong
    assert "(seed " in result.wrong
    assert result.withdrawn == ()


def test_a_kernel_that_is_wrong_in_place_alone_is_withdrawn():
    real = implementation(ROTARY)

    def wrong(out_query, out_key, positions, query, *rest):
        real.run(out_query, out_key, positions, query, *rest)
        if out_query is query:
            out_query[0, 0] += 1

    dispatch.register(ROTARY, "cpu", dispatch.Implementation("triton", wrong, priority=10))
    result = run(model(Attention(Rotary())))
    assert not result.wrong
    assert "query: in place differs from functional" in result.withdrawn[0]


def test_a_kernel_that_raises_is_withdrawn():
    def broken(*call):
        raise RuntimeError("no such core")

    dispatch.register(ROTARY, "cpu", dispatch.Implementation("triton", broken, priority=10))
    result = run(model(Attention(Rotary())))
    assert not result.wrong
    assert "RuntimeError: no such core" in result.withdrawn[0]


def test_a_wrong_kernel_that_is_never_the_first_choice_is_withdrawn_too():
    """What takes over from the first one, for calls that this one turns down."""
    real = implementation(ROTARY)
    right = dispatch.Implementation("fast", real.run, priority=10)
    wrong = dispatch.Implementation("npu_mrope", perturbed(real.run, negate_one), priority=5)
    for one in (right, wrong):
        dispatch.register(ROTARY, "cpu", one)
    result = run(model(Attention(Rotary())))
    assert not result.wrong
    assert [text.partition(" (")[0] for text in result.withdrawn] == [
        f"{ROTARY} by npu_mrope on cpu"
    ]
    assert [i.name for i in dispatch.candidates(ROTARY, "cpu")] == ["fast", "reference"]


def test_a_wrong_fused_kernel_is_withdrawn_alone():
    real = implementation(FUSED)
    wrong = dispatch.Implementation("triton", perturbed(real.run, negate_one), priority=10)
    dispatch.register(FUSED, "cpu", wrong)
    dispatch.register(ROTARY, "cpu", dataclasses.replace(implementation(ROTARY), name="other"))
    result = run(model(Attention(Rotary(), norm=64)))
    assert not result.wrong
    assert result.withdrawn[0].startswith(f"{FUSED} by triton on cpu")
    assert "other" in [i.name for i in dispatch.candidates(ROTARY, "cpu")]


def test_on_an_npu_the_triton_kernels_are_offered_for_the_test_and_not_before(monkeypatch):
    """There is no NPU here: what is seen is who is asked to register, and when."""
    offered = []
    monkeypatch.setattr(triton_call, "register_on_npu", lambda op, *rest: offered.append(op))
    selftest.offer("cpu")
    assert offered == []
    selftest.offer("npu")
    assert offered == [ops.OPERATOR, FUSED, ANGLES]
    assert not dispatch._table.get((ROTARY, "npu"))


def test_what_no_test_tries_does_not_stay(monkeypatch):
    """A model without a vision tower says nothing of the kernel for given angles."""

    def offer(device):
        pairs = [(ROTARY, "new"), (ANGLES, "new")]
        for operator, name in pairs:
            run = implementation(operator).run
            dispatch.register(operator, device, dispatch.Implementation(name, run, priority=10))
        return pairs

    monkeypatch.setattr(selftest, "offer", offer)
    assert not run(model(Attention(Rotary()))).wrong
    assert [i.name for i in dispatch.candidates(ROTARY, "cpu")] == ["new", "reference"]
    assert [i.name for i in dispatch.candidates(ANGLES, "cpu")] == ["reference"]


class ApplyRotaryEmb(torch.nn.Module):
    is_neox_style, enable_fp32_compute = True, False


class Vision(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden_size_per_attention_head, self.num_attention_heads_per_partition = 72, 16
        self.qkv = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        self.apply_rotary_emb = ApplyRotaryEmb()


def test_a_vision_tower_s_rotation_is_tried_and_a_wrong_kernel_withdrawn():
    found = names(model(Vision(), Vision()))
    assert [name.partition(" (seed")[0] for name in found] == [
        f"{ANGLES}, ApplyRotaryEmb, neox, bfloat16, heads 16:0 of 72, rotary_dim 72, s {s}"
        for s in (7, 227)  # 1 MiB of queries and keys
    ]
    rotary_selftest._tried.clear()
    wrong = perturbed(implementation(ANGLES).run, negate_one)
    dispatch.register(ANGLES, "cpu", dispatch.Implementation("triton", wrong, priority=10))
    result = run(model(Vision()))
    assert not result.wrong
    assert result.cases == 2
    assert result.withdrawn[0].startswith(f"{ANGLES} by triton on cpu")
