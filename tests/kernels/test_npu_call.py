"""torch_npu's rotary operators behind our API, on CPU: their schemas and documented semantics.

The semantics below are written from the operators' documentation and refuse what it rules out, so a
call that our verifiers let through by mistake fails here. Arithmetic is fp32, rounded once: how an
NPU rounds is not known here, which is why nothing is admitted by default.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import angles_judge  # noqa: E402
from rope_judge import run_and_judge  # noqa: E402

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import angles_cases, cases, npu_call  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
# As torch_npu 2.7 to 2.9 declares them, and from 2.10 on.
SCHEMAS = {
    "before 2.10": (
        'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half") -> Tensor',
        "npu_mrope(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, "
        'int head_size, *, int[]? mrope_section=None, str? rotary_mode="half") '
        "-> (Tensor, Tensor)",
    ),
    "from 2.10": (
        'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", '
        "Tensor? rotate=None) -> Tensor",
        "npu_mrope(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, "
        'int head_size, *, int[]? mrope_section=None, str? rotary_mode="half", '
        'str? cache_mode="default") -> (Tensor, Tensor)',
    ),
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
used: list[str] = []


def turned(x, cos, sin, half: bool):
    """x cos + rotated(x) sin; rotated is (-second, first) of each pair."""
    x32 = x.float()
    if half:
        first, second = x32.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    else:
        other = torch.stack((-x32[..., 1::2], x32[..., ::2]), dim=-1).flatten(-2)
    return (x32 * cos.float() + other * sin.float()).to(x.dtype)


def npu_rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    used.append("npu_rotary_mul")
    assert rotary_mode in ("half", "interleave")
    assert x.dim() == 4, "what we pass is BSND"
    batch, tokens, heads, width = x.shape
    assert x.dtype in FLOATS
    assert x.dtype == r1.dtype == r2.dtype
    assert width < 896
    assert width % 2 == 0
    assert r1.shape == r2.shape == (1, tokens, 1, width), "1S1D"
    if rotary_mode == "half":
        assert max(batch, heads) < 1000
    else:
        assert batch * heads < 1000
    assert all(t.is_contiguous() for t in (x, r1, r2))
    return turned(x, r1, r2, rotary_mode == "half")


def npu_mrope(
    positions,
    query,
    key,
    cos_sin_cache,
    head_size,
    *,
    mrope_section=None,
    rotary_mode="half",
    cache_mode="default",
):
    used.append("npu_mrope")
    assert rotary_mode in ("half", "interleaved")
    assert cache_mode == "default"
    assert query.dim() == key.dim() == 2
    assert query.dtype == key.dtype == cos_sin_cache.dtype
    assert query.dtype in FLOATS
    multiple = 16 if query.dtype == torch.float32 else 32
    width = cos_sin_cache.shape[1]
    assert head_size % multiple == 0
    assert width % multiple == 0
    assert positions.min() >= 0
    assert positions.max() < cos_sin_cache.shape[0]
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    if any(mrope_section):
        assert list(mrope_section) == [16, 24, 24]
        assert positions.shape == (3, query.shape[0])
        axes = [axis for axis, size in enumerate(mrope_section) for _ in range(size)]
        cos, sin = (
            torch.stack([part[axis, :, j] for j, axis in enumerate(axes)], -1)
            for part in (cos, sin)
        )
    else:
        assert positions.shape == query.shape[:1]
    half = rotary_mode == "half"
    wide = [torch.cat((a, a), -1) if half else a.repeat_interleave(2, -1) for a in (cos, sin)]
    results = []
    for x in (query, key):
        heads = x.unflatten(1, (-1, head_size)).clone()
        part = heads[..., :width]
        part.copy_(turned(part, *(angle[:, None] for angle in wide), half))
        results.append(heads.flatten(1))
    return tuple(results)


@pytest.fixture(params=list(SCHEMAS))
def operators(request):
    """The two operators under their real names, with one generation of schemas."""
    if hasattr(torch.ops.npu, "npu_mrope"):
        pytest.skip("torch_npu is loaded here: its operators are defined already")
    make = torch.library.Library
    library = make("npu", "FRAGMENT")
    for schema in SCHEMAS[request.param]:
        library.define(schema)
    library.impl("npu_rotary_mul", npu_rotary_mul, "CPU")
    library.impl("npu_mrope", npu_mrope, "CPU")
    used.clear()
    yield
    library._destroy()
    for name in ("npu_rotary_mul", "npu_mrope"):
        if name in vars(torch.ops.npu):
            delattr(torch.ops.npu, name)


def serve(monkeypatch, operator, name):
    """Have `name` take what it supports of `operator` on CPU, before the reference."""
    table = dict(dispatch._table)
    monkeypatch.setattr(dispatch, "_table", table)
    dispatch.register(operator, "cpu", npu_call.IMPLEMENTATIONS[operator, name])


ROTARY = [*cases.correctness_cases()[::2], *cases.mrope_cases()]


@pytest.mark.parametrize("name", [npu_call.ROTARY_MUL, npu_call.MROPE])
def test_rotary_embedding_matches_the_oracle(name, operators, monkeypatch, seed):
    serve(monkeypatch, "rotary_embedding", name)
    taken = set()
    for case in ROTARY:
        before = len(used)
        run_and_judge(case, seed)
        if len(used) > before:
            taken.add((case.is_neox_style, case.dtype, bool(case.mrope_section), case.from_qkv))
    assert set(used) == {name}
    assert {t[:2] for t in taken} == {(s, d) for s in cases.STYLES for d in cases.DTYPES}
    assert {t[2] for t in taken} == {t[3] for t in taken} == {True, False}


def test_apply_rotary_matches_the_oracle(operators, monkeypatch, seed):
    serve(monkeypatch, "apply_rotary", npu_call.ROTARY_MUL)
    taken = set()
    for case in angles_cases.angles_cases():
        before = len(used)
        angles_judge.run_and_judge(case, seed)
        if len(used) > before:
            taken.add((case.is_neox_style, case.batch, case.per_entry))
    assert taken >= {(style, 3, True) for style in cases.STYLES}
    assert {t[1] for t in taken} >= {None, 2}


def test_the_oracle_finds_a_mode_mixed_up(operators, monkeypatch, seed):
    """The negative control: pairs of the other style."""
    serve(monkeypatch, "rotary_embedding", npu_call.MROPE)
    case = cases.RopeCase(7, 4, 2, 64, 64, cache_dtype="bfloat16")
    run_and_judge(case, seed)
    monkeypatch.setattr(
        f"{__name__}.turned",
        lambda x, cos, sin, half, real=turned: real(x, cos, sin, not half),
    )
    with pytest.raises(AssertionError, match="out of bounds"):
        run_and_judge(case, seed)


def test_positions_outside_the_cache_are_never_looked_up(operators, monkeypatch, seed):
    case = cases.RopeCase(4, 2, 1, 64, 64, cache_dtype="bfloat16", max_position=16)
    _, query, key, cache = cases.make_inputs(case, seed)
    outside, nearest = torch.tensor([-5, 16, 3, 2**40]), torch.tensor([0, 15, 3, 15])
    want = rope.rotary_embedding(nearest, query, key, cache, **case.options)
    for name in (npu_call.ROTARY_MUL, npu_call.MROPE):
        with monkeypatch.context() as patch:
            serve(patch, "rotary_embedding", name)
            got = rope.rotary_embedding(outside, query, key, cache, **case.options)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert set(used) == {npu_call.ROTARY_MUL, npu_call.MROPE}


def call_of(case, **changes):
    """The arguments of a verifier for a case, on the meta device: nothing is read."""
    positions, query, key, cache = cases.make_inputs(case, 0)
    given = {"positions": positions, "query": query, "key": key, "cos_sin_cache": cache}
    given = {n: None if x is None else x.to("meta") for n, x in (given | changes).items()}
    return (given["query"], given["key"], *given.values(), *case.options.values())


SMALL = {"tokens": 3, "query_heads": 4, "key_heads": 2, "cache_dtype": "bfloat16"}
REFUSED = [
    ("mrope", {"key_heads": None, "head_size": 64, "rotary_dim": 64}, "key must be given"),
    ("mrope", {"head_size": 80, "rotary_dim": 80}, "multiples of 32"),
    ("mrope", {"head_size": 128, "rotary_dim": 80}, "multiples of 32"),
    ("mrope", {"head_size": 64, "rotary_dim": 64, "cache_dtype": "float32"}, "dtype of what"),
    (
        "mrope",
        {"head_size": 128, "rotary_dim": 128, "mrope_section": (24, 20, 20)},
        "must be one of",
    ),
    (
        "mrope",
        {
            "head_size": 128,
            "rotary_dim": 128,
            "mrope_section": (16, 24, 24),
            "mrope_interleaved": True,
        },
        "not interleaved",
    ),
    ("rotary_mul", {"head_size": 1024, "rotary_dim": 1024}, "below 896"),
    ("rotary_mul", {"head_size": 2, "rotary_dim": 2, "query_heads": 1000}, "below 1000"),
    ("rotary_mul", {"head_size": 64, "rotary_dim": 64, "cache_dtype": "float32"}, "dtype of what"),
]


@pytest.mark.parametrize(("name", "shape", "words"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_the_documentation_rules_out_is_turned_down(name, shape, words):
    call = call_of(cases.RopeCase(**{**SMALL, **shape}))
    ok, reason = getattr(npu_call, f"{name}_supports")(*call)
    assert not ok
    assert words in reason


def test_batch_times_heads_counts_in_gptj_style_only():
    assert npu_call.mul_supports(500, 16, 64, True) == (True, "")
    ok, reason = npu_call.mul_supports(500, 16, 64, False)
    assert not ok
    assert "batch times heads" in reason


def test_nothing_is_admitted_by_itself(operators):
    assert not [i for i in dispatch.candidates("rotary_embedding", "npu") if "npu_" in i.name]
    with pytest.raises(KeyError):
        npu_call.admit("apply_rotary", npu_call.MROPE)


def test_admitted_ones_rank_below_triton_and_above_the_reference(operators, monkeypatch):
    monkeypatch.setattr(dispatch, "_table", dict(dispatch._table))
    kernel = dispatch.Implementation("triton", print, priority=10)
    dispatch.register("rotary_embedding", "npu", kernel)
    assert npu_call.admit("rotary_embedding", npu_call.ROTARY_MUL)
    assert npu_call.admit("rotary_embedding", npu_call.MROPE)
    names = [i.name for i in dispatch.candidates("rotary_embedding", "npu")]
    assert names == ["triton", "npu_mrope", "npu_rotary_mul", "reference"]


def test_without_torch_npu_nothing_can_be_admitted(monkeypatch):
    if hasattr(torch.ops.npu, "npu_mrope"):
        pytest.skip("torch_npu is loaded here")
    monkeypatch.setattr(dispatch, "_table", dict(dispatch._table))
    assert not npu_call.admit("rotary_embedding", npu_call.MROPE)
    assert not [i for i in dispatch.candidates("rotary_embedding", "npu") if "npu_" in i.name]
