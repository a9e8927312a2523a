"""Builder and layers of real vLLM 0.18 on a GPU with gdn_attn: same results, and no waiting.

Where vLLM has no compiled parts, import what stands for them first: `python -m pytest -p MODULE`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)
vllm = pytest.importorskip("vllm", reason="vllm is not installed")
if vllm.__version__.split(".")[:2] != ["0", "18"]:
    pytest.skip(f"vllm is {vllm.__version__}; this is about 0.18", allow_module_level=True)

import gdn_vllm_steps as steps  # noqa: E402
from gdn_vllm_steps import Batch, Model, patched  # noqa: E402

from ascend_patch.impl import gdn_metadata  # noqa: E402

BATCHES = {
    "prefill": steps.PREFILL,
    "prefill and decode": steps.WITH_DECODE,
    "drafts beside prompts": steps.WITH_DRAFTS,
    "drafts alone": steps.DRAFTS_ALONE,
    "decode": steps.DECODE,
}
# bfloat16 results of two orders of summation, by the largest.
CLOSE = 1.5e-2
QUEUED_MS = 20.0


@pytest.fixture(scope="module")
def band():
    return steps.band()


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    """No layer may have been left to the release in silence."""
    monkeypatch.setattr(gdn_metadata, "_noted", set())
    yield
    assert gdn_metadata._noted == set()


def model_of(batch: Batch, seed: int, sizes: steps.Sizes | None = None) -> Model:
    drafts = steps.DRAFTS if batch.drafts is not None else 0
    return Model(sizes or steps.Sizes(), seed, drafts=drafts)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def own_slots(model: Model, step: steps.Step) -> list[torch.Tensor]:
    """The states that a step may have written, of each layer."""
    slots = step.slots.flatten().to(steps.DEVICE).long()
    return [cache[slots] for cache in model.caches()]


@pytest.mark.parametrize("name", [n for n in BATCHES if n != "drafts beside prompts"])
def test_results_and_states_are_the_release_s(band, name, seed):
    """Not beside drafts: there 0.18 gives speculative tokens the gates of others."""
    model = model_of(BATCHES[name], seed)
    step = model.step(BATCHES[name])
    with model.kept():
        expected = [out.clone() for out in step.run()]
        states = own_slots(model, step)
    step.again()
    with patched(band):
        metadata = step.build()
        assert (gdn_metadata.of(metadata) is not None) == (metadata.num_prefills > 0)
        found = step.layers(metadata)
    for got, want in zip(found, expected, strict=True):
        assert relative(got, want) < CLOSE
    for got, want in zip(own_slots(model, step), states, strict=True):
        assert relative(got, want) < CLOSE


def test_drafts_beside_prompts_are_what_they_are_alone(band, seed):
    """Ours of a mixed batch against the release's own of its parts, one after the other."""
    batch = steps.WITH_DRAFTS
    model = model_of(batch, seed)
    step = model.step(batch)
    speculative = [d >= 0 for d in batch.drafts]
    expected = [torch.empty_like(out) for out in step.out]
    with model.kept():
        for kind in (True, False):
            chosen = [i for i, s in enumerate(speculative) if s is kind]
            owner = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
            tokens = torch.isin(owner, torch.tensor(chosen)).to(steps.DEVICE)
            fields = (batch.lengths, batch.context, *[batch.drafts] * kind)
            part = model.step(Batch(*(tuple(x[i] for i in chosen) for x in fields)))
            part.slots = step.slots[chosen]
            part.inputs = [tuple(x[tokens] for x in one) for one in step.inputs]
            part.again()
            for whole, out in zip(expected, part.run(), strict=True):
                whole[tokens] = out
        states = own_slots(model, step)
    with patched(band):
        found = step.run()
    for got, want in zip(found, expected, strict=True):
        assert relative(got, want) < CLOSE
    for got, want in zip(own_slots(model, step), states, strict=True):
        assert relative(got, want) < CLOSE


def test_the_release_s_decode_goes_on_from_our_states(band, seed):
    """K and V differ: a state in the other layout would be no state of its kernel."""
    model = model_of(steps.PREFILL, seed)
    step = model.step(steps.PREFILL)
    lengths, context = steps.PREFILL.lengths, steps.PREFILL.context
    reached = tuple(n + c for n, c in zip(lengths, context, strict=True))
    after = model.step(Batch((1,) * len(lengths), reached))
    after.slots = step.slots
    after.again()
    with model.kept():
        step.run()
        expected = [out.clone() for out in after.run()]
    step.again()
    after.again()
    with patched(band):
        step.run()
    for got, want in zip(after.run(), expected, strict=True):
        assert relative(got, want) < CLOSE


def waits(call: Callable[[], object]) -> str:
    """What torch says where the host would wait for the device; empty where it never does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


@pytest.mark.parametrize("name", BATCHES)
def test_builder_and_layers_never_wait(band, name, seed):
    model = model_of(BATCHES[name], seed)
    step = model.step(BATCHES[name])
    with patched(band):
        step.run()
        for _ in range(3):
            step.again()
            assert waits(step.run) == ""
    step.again()
    step.run()
    step.again()
    # The control: this mode sees what the release does.
    stock = waits(step.run)
    print(f"{name}: the release: {stock.splitlines()[0] if stock else 'no wait'}")
    assert bool(stock) == (name != "decode")


def queue() -> None:
    """Give the device this many milliseconds of work; the host goes on at once."""
    torch.cuda._sleep(int(QUEUED_MS * CYCLES_PER_MS))


def _cycles_per_ms() -> float:
    cycles = 50_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / float(start.elapsed_time(end))


CYCLES_PER_MS = _cycles_per_ms()


def enqueued(prepare: Callable[[], object], call: Callable[[], object], runs: int = 9) -> float:
    """Milliseconds that the host takes for a call behind queued work: the median."""
    found = []
    for _ in range(runs):
        prepare()
        torch.cuda.synchronize()
        queue()
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    return statistics.median(found)


def test_the_host_goes_on_behind_queued_work(band, seed, record_property):
    model = model_of(steps.LARGE_PREFILL, seed, steps.LARGE)
    step = model.step(steps.LARGE_PREFILL)
    kept: dict[str, Any] = {}

    def cached() -> None:
        """The same tensor as last time: the release has its chunks already."""
        step.layers(kept["metadata"])

    with model.kept():
        step.run()
        kept["metadata"] = step.build()
        cached()
        times = {
            "stock": enqueued(step.again, step.run),
            "stock, cached, layers alone": enqueued(lambda: None, cached),
        }
    with model.kept(), patched(band):
        step.again()
        step.run()
        times["patched"] = enqueued(step.again, step.run)
        kept["metadata"] = step.build()
        times["patched, layers alone"] = enqueued(lambda: None, cached)
    print(f"host time behind {QUEUED_MS:.0f} ms of work, {steps.LAYERS} layers:")
    for name, value in times.items():
        print(f"  {name}: {value:.2f} ms")
        record_property(name, round(value, 3))
    assert times["stock"] > 0.9 * QUEUED_MS, "the control: the release waits"
    assert times["patched, layers alone"] <= 1.2 * times["stock, cached, layers alone"]
    assert times["patched"] < 0.5 * QUEUED_MS
