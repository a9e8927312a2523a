"""The operators under torch.compile, and what torch's own checks say about them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import graphs  # noqa: E402

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import cases, checks, ops  # noqa: E402

CALLS = [
    cases.RopeCase(7, 4, 2, 64, 64),
    cases.RopeCase(7, 4, None, 96, 32, is_neox_style=False, dtype="float32"),
    cases.RopeCase(7, 4, 2, 128, 128, mrope_section=(24, 20, 20), mrope_interleaved=True),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def positional(case, seed):
    return *cases.make_inputs(case, seed), *case.options.values()


@pytest.mark.parametrize("case", CALLS, ids=str)
@pytest.mark.parametrize("name", ["rotary_embedding", "rotary_embedding_"])
def test_opcheck(name, case, seed):
    """Schema, fake implementation, autograd registration and dynamic tracing, by torch itself."""
    operator = getattr(torch.ops.ascend_patch, name).default
    torch.library.opcheck(operator, positional(case, seed))


def test_schemas_tell_the_truth():
    functional = torch.ops.ascend_patch.rotary_embedding.default._schema
    in_place = torch.ops.ascend_patch.rotary_embedding_.default._schema
    assert not functional.is_mutable
    written = {a.name for a in in_place.arguments if a.alias_info and a.alias_info.is_write}
    assert written == {"query", "key"}
    assert not in_place.returns
    assert torch.Tag.pt2_compliant_tag in torch.ops.ascend_patch.rotary_embedding.default.tags


def test_absent_key_is_an_empty_tensor(seed):
    _, key = torch.ops.ascend_patch.rotary_embedding(*positional(CALLS[1], seed))
    assert key.shape == (0,)


def attention_head(case, operation):
    """From qkv to rotated query and key, as a model writes it."""
    query_width = case.query_heads * case.head_size
    key_width = (case.key_heads or 0) * case.head_size

    def forward(positions, qkv, cache):
        query, key, value = qkv.split([query_width, key_width, key_width], dim=-1)
        if case.key_heads is None:
            key = None
        if operation is rope.rotary_embedding_:
            query, key = query.clone(), None if key is None else key.clone()
            operation(positions, query, key, cache, **case.options)
        else:
            query, key = operation(positions, query, key, cache, **case.options)
        return query * 2, None if key is None else key * 2, value

    return forward


def qkv_inputs(case, seed, tokens):
    positions, query, _, cache = cases.make_inputs(
        cases.RopeCase(**{**vars(case), "tokens": tokens, "from_qkv": True}), seed
    )
    return positions, query._base, cache


@pytest.mark.parametrize("operation", [rope.rotary_embedding, rope.rotary_embedding_])
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_compiled_equals_eager(case, operation, seed):
    forward = attention_head(case, operation)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 33, 2):
            inputs = qkv_inputs(case, seed, tokens)
            for got, expected in zip(compiled(*inputs), forward(*inputs), strict=True):
                assert (got is None) == (expected is None)
                assert got is None or torch.equal(got, expected)


def test_inductor_hands_over_the_slices_of_qkv(seed):
    """No kernel of Inductor's own, hence no copy, between qkv and the operator."""
    utils = pytest.importorskip("torch._inductor.utils", reason="this torch has no Inductor")
    case = CALLS[0]

    def forward(positions, qkv, cache):
        query, key, _ = qkv.split([256, 128, 128], dim=-1)
        return rope.rotary_embedding(positions, query, key, cache, **case.options)

    inputs = qkv_inputs(case, seed, 7)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    got, (code,) = utils.run_and_get_code(compiled, *inputs)
    assert "ascend_patch.rotary_embedding.default(" in code
    assert [line for line in code.splitlines() if "copy_(" in line or "cpp_fused" in line] == []
    for a, b in zip(got, forward(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_functional_operator_is_one_node_without_copies(case, seed):
    forward = attention_head(case, rope.rotary_embedding)
    inputs = qkv_inputs(case, seed, 7)
    graph, clones = graphs.functionalised(forward, inputs)
    assert graphs.targets(graph).count("ascend_patch.rotary_embedding.default") == 1
    assert graphs.copies(graph) == []
    assert clones == 0


def test_in_place_operator_is_wrapped_under_functionalisation(seed):
    """Why compiled paths use the functional one; also shows that the check above can fail."""
    case = CALLS[0]

    def forward(positions, qkv, cache):
        query, key, value = qkv.split([256, 128, 128], dim=-1)
        rope.rotary_embedding_(positions, query, key, cache, **case.options)
        return query * 2, key * 2, value

    inputs = qkv_inputs(case, seed, 7)
    graph, clones = graphs.functionalised(forward, inputs)
    assert any("auto_functionalized" in t for t in graphs.copies(graph))
    assert "ascend_patch.rotary_embedding.default" not in graphs.targets(graph)
    assert clones >= 1


def test_fake_implementation_validates_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="query has 4 tokens"):
        rope.rotary_embedding(
            torch.arange(5),
            torch.zeros(4, 64),
            None,
            torch.zeros(16, 64),
            head_size=64,
            is_neox_style=True,
        )


def test_unbacked_token_counts_are_traced(seed):
    """vLLM can mark the token dimension as unbacked; a Python comparison would fail on it."""
    case = CALLS[0]
    forward = attention_head(case, rope.rotary_embedding)
    positions, qkv, cache = qkv_inputs(case, seed, 7)
    torch._dynamo.decorators.mark_unbacked(positions, 0)
    torch._dynamo.decorators.mark_unbacked(qkv, 0)
    got = torch.compile(forward, fullgraph=True, backend="aot_eager")(positions, qkv, cache)
    for a, b in zip(got, forward(positions, qkv, cache), strict=True):
        assert torch.equal(a, b)


def test_checked_mode_is_off_under_compile(monkeypatch, seed):
    monkeypatch.setenv(checks.CHECK_VARIABLE, "1")
    case = CALLS[0]
    positions, qkv, cache = qkv_inputs(case, seed, 7)
    forward = attention_head(case, rope.rotary_embedding)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(positions + 10_000, qkv, cache)
    with pytest.raises(ValueError, match="positions run"):
        forward(positions + 10_000, qkv, cache)


def test_apply_rotary_compiles(seed):
    x = torch.randn(2, 9, 3, 80, generator=torch.Generator().manual_seed(seed))
    angle = torch.randn(9, 16, generator=torch.Generator().manual_seed(seed))

    def forward(x, angle):
        return rope.apply_rotary(x, angle.cos(), angle.sin(), is_neox_style=False)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x, angle), forward(x, angle))


def test_observer_counts_executions_in_compiled_graphs(seed):
    case = CALLS[0]
    inputs = qkv_inputs(case, seed, 7)
    forward = attention_head(case, rope.rotary_embedding)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*inputs)
    seen: list[str] = []
    previous = dispatch.set_observer(seen.append)
    try:
        compiled(*inputs)
        compiled(*inputs)
        assert seen == [ops.FUNCTIONAL] * 2
        rope.rotary_embedding_(*cases.make_inputs(case, seed), **case.options)
        assert seen[2:] == [ops.IN_PLACE]
    finally:
        dispatch.set_observer(previous)
    compiled(*inputs)
    assert len(seen) == 3


def test_operator_says_so_when_nobody_takes_the_call(monkeypatch, seed):
    def refuse(*_args):
        return False, "not today"

    only = dispatch.Implementation("only", lambda *_: None, refuse)
    monkeypatch.setattr(dispatch, "_table", {(ops.OPERATOR, dispatch.ANY_DEVICE): (only,)})
    with pytest.raises(NotImplementedError, match="cannot run here: only: not today"):
        torch.ops.ascend_patch.rotary_embedding(*positional(CALLS[0], seed))


def test_reload_keeps_the_operators(seed):
    inputs = positional(CALLS[0], seed)
    before = torch.ops.ascend_patch.rotary_embedding(*inputs)
    importlib.reload(ops)
    importlib.reload(rope)
    after = torch.ops.ascend_patch.rotary_embedding(*inputs)
    assert torch.equal(before[0], after[0])


IMPORT_TWICE_FROM_THREADS = """
import sys, threading, torch
def use(results):
    from ascend_patch.kernels import rope
    x = torch.ones(2, 64)
    results.append(rope.rotary_embedding(
        torch.arange(2), x, None, torch.ones(4, 64), head_size=64, is_neox_style=True)[0].sum())
results = []
for _ in range(2):
    threads = [threading.Thread(target=use, args=(results,)) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for name in [n for n in sys.modules if n.startswith("ascend_patch")]:
        del sys.modules[name]
    import gc; gc.collect()
assert len(results) == 16 and len(set(map(float, results))) == 1, results
"""


def test_threads_and_a_fresh_import_share_one_registration():
    environment = {**os.environ, "ASCEND_PATCHES": ""}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_TWICE_FROM_THREADS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
