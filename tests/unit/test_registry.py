"""Patches as data: what contradicts itself is refused with a sentence."""

from __future__ import annotations

import dataclasses

import pytest

from ascend_patch import _registry
from ascend_patch._registry import Band, Patch, RegistryError, Symbol, Target, order

TARGET = Target("vllm.ops:f", "host", "ours:f")


def patch(name: str = "demo", **more) -> Patch:
    texts = {"summary": "s", "why": "w", "upstream": "u", "remove_when": "r"}
    return Patch(id=name, version="1", **{**texts, **more})


@pytest.mark.parametrize("text", ["vllm.ops", ":f", "vllm.ops:", ""])
def test_a_symbol_needs_both_sides(text):
    with pytest.raises(
        RegistryError, match=r"names no symbol; write it as package\.module:qualname"
    ):
        Symbol.parse(text)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seam": "other"}, "seam 'other' is none of host, traced, operator"),
        ({"seam": "operator"}, "`operator` goes with the operator seam"),
        ({"operator": "a::b"}, "`operator` goes with the operator seam"),
        ({"seam": "operator", "operator": "a.b"}, "write it as namespace::name"),
        ({"seam": "operator", "operator": "a::"}, "write it as namespace::name"),
        ({"replacement": "ours"}, "'ours' names no symbol"),
        ({"context": ("g",)}, "'g' names no symbol"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(values, sentence):
    with pytest.raises(RegistryError, match=sentence):
        dataclasses.replace(TARGET, **values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"host": "torch"}, "host 'torch' is none of vllm, vllm_ascend"),
        ({"targets": ()}, "give either targets or why it is retired"),
        ({"retired": "merged"}, "give either targets or why it is retired"),
        ({"releases": ()}, "targets need the releases they were written for"),
    ],
)
def test_a_band_that_contradicts_itself_is_refused(values, sentence):
    with pytest.raises(RegistryError, match=sentence):
        Band(
            **{
                "host": "vllm",
                "versions": "==1.0",
                "releases": ("1.0",),
                "targets": (TARGET,),
                **values,
            }
        )


@pytest.mark.parametrize("name", ["Rotary", "patch_rotary", "ro-tary", "", "1rotary"])
def test_an_id_that_cannot_be_typed_is_refused(name):
    with pytest.raises(RegistryError, match="use a lower-case identifier without `patch_`"):
        patch(name)


@pytest.mark.parametrize("field", ["version", "summary", "why", "upstream", "remove_when"])
def test_a_patch_documents_itself(field):
    with pytest.raises(RegistryError, match=f"patch demo: {field} is empty"):
        dataclasses.replace(patch(), **{field: ""})


def test_patches_and_targets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TARGET.symbol = "vllm.ops:g"


def test_a_target_attaches_with_the_module_that_assigns_it():
    assert TARGET.module == "vllm.ops"
    assert dataclasses.replace(TARGET, assigned_by="vllm.late").module == "vllm.late"


def test_a_target_is_changed_where_it_is_assigned_to():
    assert str(TARGET.place) == TARGET.symbol
    assigned = dataclasses.replace(TARGET, assigned_to="vllm.models:Layer.forward")
    assert str(assigned.place) == "vllm.models:Layer.forward"
    assert assigned.id == TARGET.symbol
    with pytest.raises(RegistryError, match="an operator has a name, and is assigned to nothing"):
        dataclasses.replace(assigned, seam="operator", operator="ns::name")


def test_an_operator_is_named_by_its_operator():
    target = Target("vllm.ops:f", "operator", "ours:f", operator="ns::name")
    assert target.id == "ns::name"


def test_order_follows_requires_and_after():
    patches = [patch("a", after=("c",)), patch("b", requires=("a",)), patch("c")]
    assert list(order(patches)) == ["c", "a", "b"]


def test_order_keeps_what_is_free_as_it_was():
    assert list(order([patch("b"), patch("a"), patch("c")])) == ["b", "a", "c"]


@pytest.mark.parametrize("link", ["requires", "after"])
def test_patches_that_wait_for_each_other_are_named(link):
    patches = [patch("a", **{link: ("b",)}), patch("b", **{link: ("a",)})]
    with pytest.raises(RegistryError, match="wait for each other: a -> b -> a"):
        order(patches)


@pytest.mark.parametrize("link", ["requires", "after", "conflicts"])
def test_a_link_to_nobody_is_named(link):
    with pytest.raises(RegistryError, match="patch a names 'ghost', which is no patch"):
        order([patch("a", **{link: ("ghost",)})])


def test_an_id_is_used_once():
    with pytest.raises(RegistryError, match="two patches share an id"):
        order([patch("a"), patch("a")])


def test_the_shipped_patches_load_and_name_recorded_symbols():
    loaded = _registry.load()
    assert {"rotary", "gdn_attn", "kv_connector", "attention_router"} <= set(loaded)
    for found in loaded.values():
        for band in found.bands:
            symbols = {s for target in band.targets for s in target.symbols}
            assert symbols <= {*found.symbols(band.host), *found.symbols("vllm")}
