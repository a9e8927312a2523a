"""patch_attention_router's self-test: it passes what is right, and sees an edge that is off by one.

On the operator surface, without a host; tests/ascend runs it inside real releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from ascend_patch import _selftest  # noqa: E402
from ascend_patch.impl import attention_ascend_steps as steps  # noqa: E402
from ascend_patch.impl import attention_selftest, attention_trials  # noqa: E402
from ascend_patch.kernels.attention.case import Case, Route  # noqa: E402
from ascend_patch.kernels.attention.route import route  # noqa: E402
from ascend_patch.kernels.npu_ops import surface  # noqa: E402

CASES = {
    "causal": Case("chunked", max_query_len=8),
    "causal 192": Case("chunked", head_size=192, num_kv_heads=2, max_query_len=8),
    "window": Case("chunked", sliding_window=20, num_kv_heads=2, max_query_len=8),
    "window prefill": Case("prefill", sliding_window=20, max_query_len=8),
    "window decode": Case("decode", sliding_window=20),
    "long window": Case("chunked", sliding_window=4096, num_heads=2, num_kv_heads=1),
    "long window decode": Case("decode", sliding_window=4096, num_heads=2, num_kv_heads=1),
    "window 256": Case(
        "chunked", sliding_window=20, head_size=256, num_heads=2, num_kv_heads=1, max_query_len=8
    ),
    "sinks": Case("chunked", sliding_window=20, sinks=True, head_size=64, max_query_len=8),
    "encoder": Case("prefill", causal=False, attn_type="encoder_only", max_query_len=8),
    "encoder window": Case(
        "prefill", causal=False, attn_type="encoder_only", sliding_window=20, max_query_len=8
    ),
    "not causal": Case("chunked", causal=False, max_query_len=8),
}
CASES = {name: replace(case, soc="emulated") for name, case in CASES.items()}
BANDS = [name for name, case in CASES.items() if route(case).sparse_mode == 4]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def operators() -> Iterator[None]:
    """The operator surface, which stays for other tests of this process if they have it."""
    before = surface.installed()
    found = surface.install("2.9.0")
    yield
    if before is None:
        found.remove()


def judged(case: Case, found: Route, seed: int, dtype: object = torch.bfloat16):
    verdict = attention_trials.Trial(found, case, dtype, CPU, seed).judged()
    print(verdict)
    return verdict


@pytest.mark.parametrize("name", CASES)
def test_each_route_is_right(name, seed):
    verdict = judged(CASES[name], route(CASES[name]), seed)
    assert verdict.wrong == ""
    # Far from the limit, and far below it only by what bfloat16 rounds.
    assert 0 < verdict.share < 0.5


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize("name", BANDS)
def test_a_window_that_is_off_by_one_is_seen(name, more, seed):
    """Also among 4096 keys, of which one is less than a rounding."""
    found = route(CASES[name])
    verdict = judged(CASES[name], replace(found, pre_tokens=found.pre_tokens + more), seed)
    assert verdict.share > 4
    assert " instead of " in verdict.wrong


@pytest.mark.parametrize("name", ["causal", "window", "sinks"])
def test_keys_behind_a_query_are_seen(name, seed):
    found = route(CASES[name])
    later = replace(found, sparse_mode=4, next_tokens=1)
    if found.pre_tokens is None:
        later = replace(later, pre_tokens=1 << 20)
    assert judged(CASES[name], later, seed).wrong


def test_a_missing_result_is_seen(seed, monkeypatch):
    monkeypatch.setattr(attention_trials, "attend", lambda *_, **__: None)
    verdict = judged(CASES["causal"], route(CASES["causal"]), seed)
    assert "no finite number" in verdict.wrong
    assert math.isinf(verdict.share)


class AscendAttentionBackendImpl:
    """What the self-test asks an instance of the release's class."""

    def __init__(self, window: int | None) -> None:
        self.head_size, self.num_heads, self.num_kv_heads = 128, 4, 2
        self.sliding_window, self.sinks, self.attn_type = window, None, "decoder"
        config = SimpleNamespace(dtype=torch.bfloat16, runner_type="generate")
        self.vllm_config = SimpleNamespace(model_config=config)


AscendAttentionBackendImpl.__module__ = steps.MODULE


@pytest.fixture
def model(monkeypatch) -> object:
    """Two layers that look alike, one that does not, and one of another class."""
    monkeypatch.setattr(attention_selftest, "_tried", set())
    monkeypatch.setattr(steps, "withdrawn", set())
    layers = []
    impls = [AscendAttentionBackendImpl(w) for w in (20, 20, None)]
    for impl in (*impls, SimpleNamespace(head_size=128)):
        layer = torch.nn.Linear(1, 1)
        layer.impl = impl
        layers.append(layer)
    return torch.nn.Sequential(*layers)


def test_layers_that_look_alike_are_tried_once(model):
    made = attention_selftest.cases(model, None)
    assert [case.name.partition(" (seed")[0] for case in made] == [
        "window-prefill of heads 4:2 of 128, window 20 in prefill",
        "window-cache of heads 4:2 of 128, window 20 in chunked",
        "window-cache of heads 4:2 of 128, window 20 in decode",
        "causal-cache of heads 4:2 of 128 in chunked",
    ]
    result = _selftest.run(made)
    assert (result.cases, result.wrong, result.withdrawn) == (4, "", ())
    assert attention_selftest.cases(model, None) == []


def test_a_route_that_disagrees_is_withdrawn_for_its_configuration(model, monkeypatch):
    real = attention_trials.attend

    def off_by_one(found, *rest, **about):
        if found.sparse_mode == 4:
            found = replace(found, pre_tokens=found.pre_tokens + 1)
        real(found, *rest, **about)

    monkeypatch.setattr(attention_trials, "attend", off_by_one)
    result = _selftest.run(attention_selftest.cases(model, None))
    assert result.wrong == ""
    assert result.cases == 1
    assert {row for row, _ in steps.withdrawn} == {"window-prefill", "window-cache"}
    assert {about.window for _, about in steps.withdrawn} == {20}
    assert len(result.withdrawn) == 2
