"""Public kernel functions: refused with a sentence before anything is written, or right."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tally import tally

torch = pytest.importorskip("torch", reason="torch is not installed")

from kernel_calls import CALLS, Made, check_ranges, mutate, normal, shares_a_slot  # noqa: E402
from torch import Tensor  # noqa: E402

from ascend_patch.kernels import gdn, kv_layout, rope  # noqa: E402

REFUSED = (TypeError, ValueError, NotImplementedError)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, gdn.ChunkMetadata):
        yield value.cu_seqlens
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)


def bytes_of(x: Tensor) -> bytes:
    """All of a tensor's memory, also what lies between its elements."""
    if x.is_meta:
        return b""
    whole = torch.empty(0, dtype=torch.uint8).set_(x.detach().untyped_storage())
    return whole.numpy().tobytes()


def memory_of(arguments: dict[str, Any]) -> dict[str, list[bytes]]:
    return {name: [bytes_of(x) for x in tensors_of(value)] for name, value in arguments.items()}


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value


# --- single faults ------------------------------------------------------------------------------


def in_place_calls() -> dict[str, tuple[Any, dict[str, Any], str]]:
    """Functions of which no one has a gradient, and a tensor that requires one."""
    found = {}
    random.seed(5)
    torch.manual_seed(5)
    for name, (function, make) in CALLS.items():
        while name != "descriptors":
            arguments = make().arguments
            wanting = [
                n
                for n, x in arguments.items()
                if isinstance(x, Tensor) and x.dtype == torch.float32 and x.numel()
            ]
            if wanting:
                found[name] = function, arguments, wanting[0]
                break
            if name == "merge_head_shards_" and arguments["caches"][0].is_floating_point():
                found[name] = function, arguments, "caches"
                break
    return found


@pytest.mark.fault("rotary_embedding_under_grad")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "descriptors"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_tensor_that_requires_a_gradient_is_refused(name, recorded):
    """Every one of them would leave a gradient out without a word; the control records none."""
    function, arguments, wanting = in_place_calls()[name]
    for x in tensors_of(arguments[wanting]):
        x.requires_grad_()
    before = memory_of(arguments)
    if not recorded:
        with torch.no_grad():
            function(**arguments)
        return
    with pytest.raises(ValueError, match=r"has no gradient, and \S+ requires one: call it under"):
        function(**arguments)
    assert memory_of(arguments) == before


@pytest.mark.fault("rotary_embedding_under_grad")
def test_the_registered_operator_refuses_too():
    """Code that goes to the operator, past the Python function, gets the same sentence."""
    query = normal(3, 8).requires_grad_()
    arguments = (torch.arange(3), query, None, normal(5, 4), 4, True, None, False)
    with pytest.raises(ValueError, match="rotary_embedding has no gradient, and query"):
        torch.ops.ascend_patch.rotary_embedding.default(*arguments)


@pytest.mark.fault("conv_query_start_loc_out_of_range")
@pytest.mark.parametrize("starts", [[0, 2, 9], [0, 3, 1, 4], [1, 4], [-1, 4]])
@pytest.mark.parametrize("update", [False, True])
def test_sequences_that_do_not_lie_in_the_tokens_are_refused(starts, update):
    if update and starts == [1, 4]:
        pytest.skip("a step of decode may begin behind other tokens")
    arguments = {
        "x": normal(4, 3),
        "weight": normal(3, 4),
        "conv_state": normal(5, 3, 3),
        "state_indices": torch.arange(len(starts) - 1),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "out": torch.full((4, 3), 7.0),
    }
    before = memory_of(arguments)
    function = gdn.causal_conv1d_update if update else gdn.causal_conv1d
    with pytest.raises(ValueError, match=r"query_start_loc (must begin|ends at token)"):
        function(**arguments)
    assert memory_of(arguments) == before


@pytest.mark.fault("conv_query_start_loc_out_of_range")
@pytest.mark.parametrize(("size", "values"), [(0, 4), (4, 0)])
def test_heads_without_elements_are_refused(size, values):
    q, v = normal(1, 2, 1, size), normal(1, 2, 1, values)
    g = -torch.rand(1, 2, 1)
    with pytest.raises(ValueError, match="heads must have elements"):
        gdn.chunk_gated_delta_rule(q, q.clone(), v, g, g.exp(), state_layout="VK")
    with pytest.raises(ValueError, match="heads must have elements"):
        gdn.recurrent_gated_delta_rule(
            q, q.clone(), v, g=g, beta=g.exp(), state_layout="VK",
            state=normal(3, 1, values, size), state_indices=torch.arange(2),
        )  # fmt: skip


@pytest.mark.fault("gdn_slot_out_of_range")
@pytest.mark.parametrize("rule", ["chunk", "recurrent", "conv", "conv update"])
@pytest.mark.parametrize("slot", [4, 99, 2**31 - 1])
def test_a_slot_that_the_cache_does_not_have_is_refused_before_any_state_is_written(rule, slot):
    """The last of three sequences: the states of the first two were written before it raised."""
    indices = torch.tensor([2, 0, slot])
    starts = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    if rule.startswith("conv"):
        arguments = {
            "x": normal(6 if rule == "conv" else 3, 3),
            "weight": normal(3, 4),
            "conv_state": normal(4, 3, 3),
            "state_indices": indices,
        }
        if rule == "conv":
            arguments["query_start_loc"] = starts
        function = gdn.causal_conv1d if rule == "conv" else gdn.causal_conv1d_update
    else:
        q, v, g = normal(1, 6, 1, 4), normal(1, 6, 1, 6), -torch.rand(1, 6, 1)
        arguments = {
            "q": q, "k": q.clone(), "v": v, "g": g, "beta": g.exp(), "state_layout": "VK",
            "state": normal(4, 1, 6, 4), "state_indices": indices, "cu_seqlens": starts,
        }  # fmt: skip
        function = gdn.chunk_gated_delta_rule if rule == "chunk" else gdn.recurrent_gated_delta_rule
    before = memory_of(arguments)
    with pytest.raises(ValueError, match=f"state_indices names slot {slot}, and the cache has 4"):
        function(**arguments)
    assert memory_of(arguments) == before
    # The control: padding is no slot.
    arguments["state_indices"] = torch.tensor([2, 0, -1])
    function(**arguments)


@pytest.mark.fault("has_initial_state_types")
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8, torch.bool])
def test_both_rules_take_the_same_has_initial_state(dtype):
    carried = torch.tensor([1, 0]).to(dtype)
    metadata = gdn.build_chunk_metadata(torch.tensor([0, 2, 4]), torch.device("cpu"))
    shared = {
        "state_indices": torch.tensor([1, 0]),
        "has_initial_state": carried,
        "chunk_metadata": metadata,
    }
    q, g = normal(1, 4, 1, 4), -torch.rand(1, 4, 1)
    calls = (
        lambda: gdn.causal_conv1d(normal(4, 3), normal(3, 4), conv_state=normal(2, 3, 3), **shared),
        lambda: gdn.chunk_gated_delta_rule(
            q, q.clone(), q.clone(), g, g.exp(), state_layout="VK", state=normal(2, 1, 4, 4),
            **shared,
        ),
    )  # fmt: skip
    for call in calls:
        if dtype == torch.bool:
            call()
        else:
            with pytest.raises(TypeError, match="has_initial_state must be bool"):
                call()


def plan_of(block_size: int = 2) -> kv_layout.Plan:
    group = kv_layout.LayerGroup(1, 2, (2, 2))
    sides = [kv_layout.Side((group,), tp, block_size=block_size) for tp in (1, 2)]
    return kv_layout.plan_transfers(kv_layout.Topology(*sides), direction="pull")


@pytest.mark.fault("descriptor_ids_out_of_range")
@pytest.mark.parametrize("number", [2**63, 2**64, -1, 1.5, True, None, "x", 2**62])
@pytest.mark.parametrize("where", ["prefill", "decode", "base"])
def test_ids_and_addresses_that_are_none_are_refused(number, where):
    """2**62 is an id; what it is multiplied by and added to ends beyond an address."""
    plan = plan_of()
    ids = {"prefill": [3], "decode": [4], "base": [0]} | {where: [number]}
    bases = [ids["base"][0], 4096]

    def call() -> kv_layout.Descriptors:
        pairs = kv_layout.match_blocks(plan.topology, ids["prefill"], ids["decode"])
        given = {"prefill_bases": bases, "decode_bases": [0, 4096]}
        return kv_layout.descriptors(plan, 0, 1, pairs, **given)

    if where == "base" and number == 2**62:
        assert len(call())
        return
    with pytest.raises((TypeError, ValueError), match=r"must be|2\*\*63") as refused:
        call()
    assert type(refused.value) in (TypeError, ValueError)


@pytest.mark.fault("merge_block_id_types")
@pytest.mark.parametrize("number", [1.5, True, "1", None, 2**63, -1, 9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_block_id_that_is_none_is_refused(number, as_tensor):
    caches = [torch.randn(4, 2, 2, 3)]
    ids: Any = [2, number]
    if as_tensor:
        if number is None or isinstance(number, str) or number == 2**63:
            pytest.skip("no tensor holds it")
        ids = torch.tensor([number])
    before = bytes_of(caches[0])
    with pytest.raises((TypeError, ValueError), match=r"[Bb]lock_?\s?ids|block ids"):
        kv_layout.merge_head_shards_(caches, ids, 2)
    assert bytes_of(caches[0]) == before


def test_an_output_that_overlaps_what_is_read_is_refused():
    memory = normal(10, 4)
    with pytest.raises(ValueError, match="shares memory with x"):
        gdn.causal_conv1d_update(memory[:5], normal(9, 4, 3), normal(4, 4), out=memory[2:7])
    with pytest.raises(ValueError, match="query shares memory with key"):
        rope.rotary_embedding_(
            torch.arange(4), memory[:4], memory[1:5], normal(9, 4), head_size=4, is_neox_style=True
        )
    with pytest.raises(ValueError, match="let several elements share memory"):
        rope.rotary_embedding_(
            torch.arange(4), memory[:1].expand(4, 4), None, normal(9, 4), head_size=4,
            is_neox_style=True,
        )  # fmt: skip
    # The control: columns of the same rows, as q and k are of qkv.
    rope.rotary_embedding_(
        torch.arange(10), memory[:, :2], memory[:, 2:], normal(9, 2), head_size=2,
        is_neox_style=True,
    )  # fmt: skip


# --- random arguments ---------------------------------------------------------------------------

CALLS_TRIED = 8000
SECONDS = 20.0


def judge(name: str, made: Made, given: dict[str, Any], result: Any) -> None:
    """Raise AssertionError unless a call that was accepted is right, to the byte where it copies.

    Args:
        given: Copies of the arguments, made before the call.
    """
    if any(x.is_meta for x in tensors_of(list(made.arguments.values()))):
        return  # there is no memory to be wrong
    if shares_a_slot(given):
        return
    if name == "descriptors":
        check_ranges(given, result)
        return
    wanted = dict(made.wanted(given))
    rows = wanted.pop("rows", None)
    results = result if isinstance(result, tuple) else (result,)
    expected = wanted.pop("result")
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(results, expected, strict=True):
        if rows is not None and isinstance(got, Tensor) and got is results[0]:
            got = got[:, rows]
        close(got, want, made.slack)
    for argument, want in wanted.items():
        value = made.arguments.get(argument)
        if isinstance(value, list):
            for got, one in zip(value, want, strict=True):
                close(got, one, made.slack)
        else:
            close(value, want, made.slack)


def close(got: Any, want: Any, slack: float) -> None:
    assert (got is None) == (want is None), (type(got), type(want))
    if got is None:
        return
    assert tuple(got.shape) == tuple(want.shape)
    if not slack:
        assert torch.equal(got, want)
        return
    found, want = got.detach().double(), want.detach().double()
    size = want.abs().amax().item() if want.numel() else 0.0
    limit = slack * (2 * torch.finfo(got.dtype).eps + 2e-6) * (size + 1)
    error = (found - want).abs().amax().item() if want.numel() else 0.0
    assert error <= limit, f"{error} of {limit}"


def outcome_of(name: str, number: int) -> str:
    """Make a call, change up to two of its arguments, and hold it to its promise.

    Returns:
        `refused` or `right`.
    """
    function, make = CALLS[name]
    made = make()
    arguments = made.arguments
    changes = [mutate(arguments) for _ in range(random.choice((0, 1, 1, 1, 2)))]
    before, given = memory_of(arguments), {n: copied(x) for n, x in arguments.items()}
    what = f"call {number}, {name} with {changes}"
    try:
        result = function(**arguments)
    except Exception as error:
        refusal: Exception = error
    else:
        check_untouched(made, before, what)
        try:
            judge(name, made, given, result)
        except Exception as error:
            raise AssertionError(f"{what}: taken, but {type(error).__name__}: {error}") from error
        return "right"
    text = str(refusal)
    # torch's own, where an argument of a registered operator is of another kind altogether.
    by_schema = isinstance(refusal, RuntimeError) and "ascend_patch::" in text
    assert isinstance(refusal, REFUSED) or by_schema, f"{what}: {refusal!r}"
    assert changes, f"{what}: {text}"
    assert len(text) > 20, f"{what}: no sentence: {text}"
    assert memory_of(arguments) == before, f"{what}: written before it was refused: {text}"
    return "refused"


def check_untouched(made: Made, before: dict[str, list[bytes]], what: str) -> None:
    """What is not written to has the bytes that it had, unless the caller shared its memory."""
    arguments = made.arguments
    written = {
        x.untyped_storage().data_ptr()
        for name in made.written
        for x in tensors_of(arguments.get(name))
    }
    for name, memory in memory_of(arguments).items():
        if any(x.untyped_storage().data_ptr() in written for x in tensors_of(arguments[name])):
            continue
        assert memory == before[name], f"{what}: {name} was written to"


@pytest.mark.fault("rotary_embedding_under_grad")
@pytest.mark.fault("gdn_slot_out_of_range")
@pytest.mark.fault("merge_block_id_types")
@pytest.mark.fault("descriptor_ids_out_of_range")
def test_random_wrong_arguments_are_refused_or_answered_right(seed):
    """Other dtypes, devices, shapes, memory and values, in up to two arguments of a call."""
    random.seed(seed)
    torch.manual_seed(seed)
    found = {name: {"refused": 0, "right": 0} for name in CALLS}
    names, started, done = list(CALLS), time.process_time(), 0
    while done < CALLS_TRIED and time.process_time() - started < SECONDS:
        name = names[done % len(names)]
        found[name][outcome_of(name, done)] += 1
        done += 1
    assert done >= 2000, f"{done} calls in {SECONDS} s"
    # Both outcomes were seen, of every function: neither is reached by refusing, or taking, all.
    assert min(min(one.values()) for one in found.values()) > 10, found
    refused = sum(one["refused"] for one in found.values())
    tally(
        "kernels: calls with up to two wrong arguments",
        tried=done,
        unit="calls",
        seed=seed,
        note=f"{refused} refused with nothing written, {done - refused} right",
    )
