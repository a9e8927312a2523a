"""patch_rotary's self-test on a model's rotary layers, with kernels that are right and wrong."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rotary_model import Attention, Rotary, as_expected, model, names, run  # noqa: E402

from ascend_patch.impl import rotary_selftest  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.rope import selftest  # noqa: E402

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


def test_layers_that_are_right_pass_with_the_largest_error():
    shared = Rotary()
    result = run(
        model(
            Attention(shared),
            Attention(shared),
            Attention(Rotary(96, 96, False, torch.float16), 12, 1),
            Attention(Rotary(128, 80, True, torch.float32), 8, 8),
            Attention(Rotary(128, 128, section=(16, 24, 24))),
        )
    )
    assert not result.wrong, result.wrong
    # Three numbers of tokens and the layer as a whole, for four kinds of layers; and as text.
    assert result.cases == 19
    assert 0 < result.ulps <= 1
    assert 0 < result.share <= 1


def test_a_layer_is_named_with_what_matters():
    found = names(model(Attention(Rotary(96, 64, False), 12, 3)))
    assert found[0].startswith(
        "rotary_embedding, Rotary, gptj, bfloat16, heads 12:3 of 96, rotary_dim 64, T 1, cache "
    )
    assert [name.split(", T ")[1].split(",")[0] for name in found[:-1]] == ["1", "7", "257"]


def test_a_model_is_tried_once_and_another_one_again():
    it = model(Attention(Rotary()))
    assert names(it)
    assert names(it) == []
    assert names(model(Attention(Rotary(), heads=6)))


def test_a_cache_of_another_dtype_is_tried_as_it_is_and_as_it_is_cast():
    layer = Rotary()
    layer.cos_sin_cache = layer.cos_sin_cache.float()
    found = [name.rsplit("cache ")[1].split()[0] for name in names(model(Attention(layer)))[:-1]]
    assert sorted(set(found)) == ["torch.bfloat16", "torch.float32"]
    rotary_selftest._tried.clear()
    assert not run(model(Attention(layer))).wrong


def test_norms_of_q_and_k_bring_the_fused_kernel_in():
    found = names(model(Attention(Rotary(), norm=64)))
    assert sum(name.startswith(FUSED) for name in found) == 3
    rotary_selftest._tried.clear()
    assert not run(model(Attention(Rotary(), norm=64))).wrong
    # A norm over all heads at once is another operation.
    rotary_selftest._tried.clear()
    assert not any(FUSED in name for name in names(model(Attention(Rotary(), norm=256))))


def test_heads_have_a_default_and_data_must_be_there():
    lonely = torch.nn.Module()
    lonely.rotary_emb = Rotary()
    assert "heads 8:1 of 64" in names(model(lonely))[0]
    empty = Rotary()
    empty.cos_sin_cache = empty.cos_sin_cache.to("meta")
    assert names(model(Attention(empty))) == []
    assert run(model(torch.nn.Linear(2, 2))).cases == 0


# The layer as a whole


@contextlib.contextmanager
def host_code(layer, own):
    layer.own = own
    try:
        yield
    finally:
        layer.own = None


def test_ours_that_reads_the_layer_wrongly_is_found():
    """The kernel is right, and rotates by another style than the host does."""
    layer, other = Rotary(), Rotary(neox=False)
    result = run(model(Attention(layer)), lambda: host_code(layer, other))
    assert "the layer of Rotary, neox" in result.wrong
    assert "unlike the host's own" in result.wrong


def test_a_layer_that_cannot_be_called_alone_is_tried_by_its_kernels():
    layer = Rotary()

    def needs_context(positions, query, key):
        raise AssertionError("Forward context is not set")

    result = run(model(Attention(layer)), lambda: host_code(layer, needs_context))
    assert not result.wrong
    assert result.cases == 4


# What it must leave alone


def test_the_server_s_random_numbers_stay_as_they_are():
    it = model(Attention(Rotary(), norm=64))
    state = torch.get_rng_state()
    assert not run(it).wrong
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("heads", "size"), [(128, 128), (4, 64)])
def test_inputs_are_small_whatever_the_model(heads, size):
    for case in rotary_selftest.cases(
        model(Attention(Rotary(size, size), heads, heads)), as_expected
    ):
        trial = getattr(case.withdraw, "args", [None])[0]
        if isinstance(trial, selftest.Call):
            base = trial.query._base
            assert base is not None
            assert base.numel() * base.element_size() <= BYTES


def test_inputs_are_fresh():
    first = rotary_selftest.cases(model(Attention(Rotary())), as_expected)
    rotary_selftest._tried.clear()
    second = rotary_selftest.cases(model(Attention(Rotary())), as_expected)
    a, b = (cases[1].withdraw.args[0].query for cases in (first, second))
    assert not torch.equal(a, b)
