"""patch_rotary's self-test on a model's rotary layers, with kernels that are right and wrong."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch import _selftest  # noqa: E402
from ascend_patch.impl import rotary_selftest  # noqa: E402
from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import ops, selftest, triton_call  # noqa: E402

BYTES = 8 << 20
ROTARY, FUSED = "rotary_embedding", "split_qkv_rmsnorm_rope"


class Rotary(torch.nn.Module):
    """A layer as vLLM builds it; its forward is ours, or with `own` one of the host's."""

    def __init__(self, size=64, rotary_dim=64, neox=True, dtype=torch.bfloat16, section=None):
        super().__init__()
        self.head_size, self.is_neox_style, self.dtype = size, neox, dtype
        if section:
            self.mrope_section, self.mrope_interleaved = list(section), False
        angle = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(0, rotary_dim, 2) / size))
        self.register_buffer("cos_sin_cache", torch.cat((angle.cos(), angle.sin()), 1).to(dtype))
        self.own = None

    def forward(self, positions, query, key):
        if self.own is not None:
            return self.own(positions, query, key)
        section = getattr(self, "mrope_section", None) if positions.dim() == 2 else None
        return rope.rotary_embedding(
            positions,
            query,
            key,
            self.cos_sin_cache,
            head_size=self.head_size,
            is_neox_style=self.is_neox_style,
            mrope_section=section,
        )


class Attention(torch.nn.Module):
    def __init__(self, layer, heads=4, kv_heads=2, norm=0):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.rotary_emb = heads, kv_heads, layer
        if norm:
            self.q_norm, self.k_norm = torch.nn.Module(), torch.nn.Module()
            for module in (self.q_norm, self.k_norm):
                module.weight = torch.nn.Parameter(torch.rand(norm))
                module.variance_epsilon = 1e-5


def model(*attentions):
    return torch.nn.Sequential(*attentions)


@contextlib.contextmanager
def as_expected():
    yield


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    monkeypatch.setattr(rotary_selftest, "_tried", set())


@pytest.fixture(autouse=True)
def _table_as_expected():
    before = dict(dispatch._table)
    yield
    dispatch._table.clear()
    dispatch._table.update(before)


def run(it, expected=as_expected):
    return _selftest.run(rotary_selftest.cases(it, expected))


def names(it):
    return [case.name for case in rotary_selftest.cases(it, as_expected)]


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
    # Three numbers of tokens and the layer as a whole, for four kinds of layers.
    assert result.cases == 16
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


def test_a_wrong_fused_kernel_is_withdrawn_alone():
    real = implementation(FUSED)
    wrong = dispatch.Implementation("triton", perturbed(real.run, negate_one), priority=10)
    dispatch.register(FUSED, "cpu", wrong)
    dispatch.register(ROTARY, "cpu", dataclasses.replace(implementation(ROTARY), name="other"))
    result = run(model(Attention(Rotary(), norm=64)))
    assert not result.wrong
    assert result.withdrawn[0].startswith(f"{FUSED} by triton on cpu")
    assert "other" in [i.name for i in dispatch.candidates(ROTARY, "cpu")]


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


def test_on_an_npu_the_triton_kernels_are_offered_for_the_test_and_not_before(monkeypatch):
    """There is no NPU here: what is seen is who is asked to register, and when."""
    offered = []
    monkeypatch.setattr(triton_call, "register_on_npu", lambda op, *rest: offered.append(op))
    selftest.offer("cpu")
    assert offered == []
    selftest.offer("npu")
    assert offered == [ops.OPERATOR, FUSED]
    assert not dispatch._table.get((ROTARY, "npu"))
