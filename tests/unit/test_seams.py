"""Host and traced seams: what is changed, what is refused, and what is given back."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest
import wrapt

from ascend_patch import _layers
from ascend_patch._registry import Target

SOURCE = """
import functools
def f(x):
    return ["f", x]
g = f
def keyword_only(*, x):
    return ["keyword_only", x]
def positional_only(x, /):
    return ["positional_only", x]
@functools.lru_cache
def cached(x):
    return ["cached", x]
class Base:
    def inherited(self, x):
        return ["inherited", x]
class Layer(Base):
    def method(self, x):
        return ["method", x]
    @staticmethod
    def static(x):
        return ["static", x]
    @classmethod
    def of_class(self, x):
        return ["of_class", self.__name__, x]
    @property
    def prop(self):
        return "prop"
class Deep:
    class Inner:
        def method(self, x):
            return ["deep", x]
"""
REPLACEMENT = {"host": "ap_ours:host", "traced": "ap_ours:function"}
METHOD = {"host": "ap_ours:host", "traced": "ap_ours:method"}
SEAMS = pytest.mark.parametrize("seam", ["host", "traced"])


@pytest.fixture
def module(site, ours):
    site.write("ap_m", SOURCE)
    return importlib.import_module("ap_m")


def method_target(name: str, seam: str) -> Target:
    return Target(f"ap_m:{name}", seam, METHOD[seam])


def function_target(name: str, seam: str) -> Target:
    return Target(f"ap_m:{name}", seam, REPLACEMENT[seam])


@SEAMS
def test_a_function_is_replaced_and_given_back(bench, module, seam):
    original = module.f
    bench.arm(function_target("f", seam))
    assert module.f(1) == ["ours", "f", 1]
    bench.applier.revert("demo")
    assert module.f is original


@SEAMS
def test_aliases_in_every_module_follow_and_are_given_back(bench, module, seam):
    original = module.f
    user = sys.modules["ap_user"] = types.ModuleType("ap_user")
    user.taken = original
    bench.arm(function_target("f", seam))
    assert [module.f(1), module.g(1), user.taken(1)] == [["ours", "f", 1]] * 3
    bench.applier.revert("demo")
    assert module.f is module.g is user.taken is original


@SEAMS
def test_an_alias_made_after_the_patch_is_given_back_too(bench, module, seam):
    original = module.f
    bench.arm(function_target("f", seam))
    user = sys.modules["ap_user"] = types.ModuleType("ap_user")
    user.taken = module.f
    bench.applier.revert("demo")
    assert user.taken is original


@SEAMS
def test_an_alias_that_was_rebound_since_is_left_alone(bench, module, seam):
    user = sys.modules["ap_user"] = types.ModuleType("ap_user")
    user.taken = module.f
    bench.arm(function_target("f", seam))
    user.taken = theirs = object()
    bench.applier.revert("demo")
    assert user.taken is theirs


def test_a_lazy_module_that_explodes_when_it_is_touched_is_not_touched(bench, module):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"{name} was asked for")

    class NoModule:
        @property
        def __class__(self):
            raise AssertionError("its class was asked for")

    sys.modules["ap_lazy"], sys.modules["ap_odd"] = Lazy("ap_lazy"), NoModule()
    bench.arm(function_target("f", "host"))
    assert module.g(1) == ["ours", "f", 1]
    bench.applier.revert("demo")
    del sys.modules["ap_lazy"], sys.modules["ap_odd"]


@SEAMS
@pytest.mark.parametrize(
    ("name", "kind"), [("method", None), ("static", staticmethod), ("of_class", classmethod)]
)
def test_descriptors_keep_their_kind(bench, module, seam, name, kind):
    make = function_target if name == "static" else method_target
    original = vars(module.Layer)[name]
    bench.arm(make(f"Layer.{name}", seam))
    raw = inspect.getattr_static(module.Layer, name)
    assert kind is None or isinstance(raw, kind)
    assert getattr(module.Layer(), name)(1) == ["ours", name, *["Layer"] * (kind is classmethod), 1]
    bench.applier.revert("demo")
    assert vars(module.Layer)[name] is original


@SEAMS
def test_an_inherited_method_is_patched_in_the_subclass_only(bench, module, seam):
    bench.arm(method_target("Layer.inherited", seam))
    assert module.Layer().inherited(1) == ["ours", "inherited", 1]
    assert module.Base().inherited(1) == ["inherited", 1]
    bench.applier.revert("demo")
    assert "inherited" not in vars(module.Layer)


@SEAMS
def test_a_base_and_its_subclass_are_patched_once_each(bench, module, seam):
    bench.arm(method_target("Base.inherited", seam), method_target("Layer.inherited", seam))
    assert module.Base().inherited(1) == ["ours", "inherited", 1]
    assert module.Layer().inherited(1) == ["ours", "inherited", 1]


@SEAMS
def test_a_method_of_a_nested_class_is_patched(bench, module, seam):
    bench.arm(method_target("Deep.Inner.method", seam))
    assert module.Deep.Inner().method(1) == ["ours", "deep", 1]


@SEAMS
def test_the_name_and_signature_of_the_original_are_kept(bench, module, seam):
    bench.arm(method_target("Layer.method", seam))
    assert module.Layer.method.__qualname__ == "Layer.method"
    assert list(inspect.signature(module.Layer.method).parameters) == ["self", "x"]


REFUSED = [
    ("host", "Layer.prop", "is a property; a host seam needs a function or a method"),
    ("traced", "Layer.prop", "is a property; a traced seam needs a function"),
    ("host", "Layer", "is a type; a host seam needs a function or a method"),
    ("traced", "Layer", "is a type; a traced seam needs a function"),
    ("traced", "cached", "_lru_cache_wrapper; a traced seam needs a function"),
    ("traced", "keyword_only", "keyword_only takes (*, x), our replacement takes (x)"),
    ("traced", "positional_only", "positional_only takes (x, /), our replacement takes (x)"),
    ("host", "nothing", "ap_m has no nothing"),
    ("traced", "Nobody.method", "ap_m has no Nobody, which Nobody.method is part of"),
]


@pytest.mark.expects_failure
@pytest.mark.parametrize(("seam", "name", "reason"), REFUSED)
def test_what_cannot_be_patched_is_refused_with_a_sentence(bench, module, seam, name, reason):
    before = dict(vars(module)), dict(vars(module.Layer))
    patch = bench.arm(function_target(name, seam))
    assert patch.state == "failed"
    assert reason in patch.reason
    assert (dict(vars(module)), dict(vars(module.Layer))) == before


def foreign(function):
    def stranger(*args):
        return ["foreign", *function(*args)]

    # Where a function says it comes from can be copied; its globals cannot.
    return types.FunctionType(
        stranger.__code__, {"__name__": "stranger.lib"}, "stranger", None, stranger.__closure__
    )


def test_a_foreign_wrapper_under_a_host_seam_is_named(bench, module):
    module.f = foreign(module.f)
    patch = bench.arm(function_target("f", "host"))
    assert patch.targets[0].reason == "stranger of stranger.lib had wrapped it before"
    assert module.f(1) == ["ours", "foreign", "f", 1]


def place_of(module, name):
    """The owner of `name` in the module, its attribute, and what is there, undescribed."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(module, owner) if owner else module
    return found, attribute, inspect.getattr_static(found, attribute)


WRAPPED = {
    "f": lambda module: module.f(1),
    "Layer.method": lambda module: module.Layer().method(1),
    "Layer.static": lambda module: module.Layer.static(1),
    "Layer.of_class": lambda module: module.Layer.of_class(1),
}


def wrapped_target(name):
    return (method_target if name in ("Layer.method", "Layer.of_class") else function_target)(
        name, "traced"
    )


def wrapped_by(mark, raw):
    return wrapt.FunctionWrapper(raw, lambda f, _, a, k: [mark, *f(*a, **k)])


@pytest.mark.parametrize("name", WRAPPED)
def test_a_traced_seam_goes_beneath_a_wrapt_wrapper(bench, module, name):
    """Around it ours would be what a compiled forward does not see."""
    before = WRAPPED[name](module)
    owner, attribute, raw = place_of(module, name)
    inner = wrapped_by("inner", raw)
    outer = wrapped_by("outer", inner)
    setattr(owner, attribute, outer)
    patch = bench.arm(wrapped_target(name))
    assert patch.state == "applied", patch.reason
    assert f"a wrapt wrapper of {__name__} had wrapped it before" in patch.targets[0].reason
    assert WRAPPED[name](module) == ["outer", "inner", "ours", *before]
    assert bench.applier.check() == []
    bench.applier.revert("demo")
    assert WRAPPED[name](module) == ["outer", "inner", *before]
    assert inner.__wrapped__ is raw
    bench.applier.apply_again("demo", sys.modules)
    assert WRAPPED[name](module) == ["outer", "inner", "ours", *before]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_that_is_taken_off_leaves_ours_and_the_revert_the_original(bench, module, name):
    before = WRAPPED[name](module)
    owner, attribute, raw = place_of(module, name)
    setattr(owner, attribute, wrapped_by("outer", raw))
    bench.arm(wrapped_target(name))
    setattr(owner, attribute, place_of(module, name)[2].__wrapped__)
    assert WRAPPED[name](module) == ["ours", *before]
    bench.applier.revert("demo")
    assert place_of(module, name)[2] is raw


@pytest.mark.expects_failure
@pytest.mark.parametrize("name", ["f", "Layer.static", "Layer.of_class"])
@pytest.mark.parametrize("in_a_proxy", [False, True], ids=["alone", "in a proxy"])
def test_a_foreign_function_under_a_traced_seam_is_refused_by_name(bench, module, name, in_a_proxy):
    owner, attribute, raw = place_of(module, name)
    function = foreign(getattr(raw, "__func__", raw))
    found = type(raw)(function) if raw is not getattr(raw, "__func__", raw) else function
    setattr(owner, attribute, wrapped_by("outer", found) if in_a_proxy else found)
    patch = bench.arm(function_target(name, "traced"))
    by = f"a wrapt wrapper of {__name__}" if in_a_proxy else "stranger of stranger.lib"
    assert f"already replaced by {by}; it was left alone. Let that come after" in patch.reason


def test_a_function_that_another_module_of_the_host_assigns_is_no_foreigner(bench, module):
    module.f = types.FunctionType(module.f.__code__, {"__name__": "ap_host.late"}, "f")
    sys.modules["ap_host.late"] = types.ModuleType("ap_host.late")
    patch = bench.arm(Target("ap_m:f", "traced", "ap_ours:function", assigned_by="ap_host.late"))
    assert patch.state == "applied", patch.reason


@SEAMS
def test_what_a_host_assigns_into_another_class_is_replaced_there(bench, module, seam):
    """As vllm_ascend does with methods that it writes in classes of its own."""
    late = types.ModuleType("ap_host.late")
    exec("class Ours:\n    def method(self, x):\n        return ['assigned', x]", vars(late))
    sys.modules["ap_host.late"] = late
    written = vars(late.Ours)["method"]
    module.Layer.method = written
    target = Target(
        "ap_host.late:Ours.method", seam, METHOD[seam],
        assigned_by="ap_host.late", assigned_to="ap_m:Layer.method",
    )  # fmt: skip
    patch = bench.arm(target)
    assert patch.state == "applied", patch.reason
    assert patch.targets[0].id == "ap_host.late:Ours.method"
    assert module.Layer().method(1)[-2:] == ["assigned", 1]
    assert module.Layer().method(1)[0] == "ours"
    assert vars(late.Ours)["method"] is written
    assert bench.applier.check() == []
    bench.applier.revert("demo")
    assert vars(module.Layer)["method"] is written


@SEAMS
def test_a_foreign_wrapper_around_ours_is_left_and_ours_steps_aside(bench, module, seam):
    bench.arm(function_target("f", seam))
    module.f = wrapper = foreign(module.f)
    assert bench.applier.check() == ["demo: ap_m:f is wrapped by stranger of stranger.lib"]
    bench.applier.revert("demo")
    assert module.f is wrapper
    assert module.f(1) == ["foreign", "f", 1]


def test_what_replaced_ours_is_named_and_forgotten_when_it_is_gone(bench, module):
    patch = bench.arm(function_target("f", "host"))
    ours, module.f = module.f, foreign(len)
    assert bench.applier.check() == [
        "demo: ap_m:f is replaced by stranger of stranger.lib after we had applied; that is in "
        "force and ours does not run: leave one of the two out"
    ]
    assert "replaced by stranger" in patch.targets[0].reason
    assert patch.targets[0].state == "hidden"
    module.f = ours
    assert bench.applier.check() == []
    assert (patch.targets[0].state, patch.targets[0].reason) == ("applied", "")


@SEAMS
def test_a_class_in_the_place_of_ours_is_named(bench, module, seam):
    patch = bench.arm(method_target("Layer.method", seam))
    layer = module.Layer
    module.Layer = type("Theirs", (), {"method": lambda self, x: ["theirs"], "__module__": "lib"})
    (said,) = bench.applier.check()
    assert "is in a class that was replaced by lib.Theirs after we had applied" in said
    assert patch.targets[0].state == "hidden"
    # A class that inherits ours runs it.
    module.Layer = type("Heir", (layer,), {})
    assert module.Layer().method(1) == ["ours", "method", 1]
    assert bench.applier.check() == []
    del module.Layer
    (said,) = bench.applier.check()
    assert "ap_m has no Layer" in said
    assert patch.targets[0].state == "hidden"


@SEAMS
def test_a_bound_method_that_was_taken_before_the_revert_gives_the_original(bench, module, seam):
    bench.arm(method_target("Layer.method", seam))
    taken = module.Layer().method
    assert taken(1) == ["ours", "method", 1]
    bench.applier.revert("demo")
    assert taken(1) == ["method", 1]


def test_calls_are_counted_while_ours_is_on(bench, module):
    bench.arm(function_target("f", "traced"))
    taken = module.f
    taken(1), taken(2)
    bench.applier.revert("demo")
    taken(3)
    assert bench.state.counters.value("demo/ap_m:f") == 2


@pytest.mark.parametrize("name", ["f", "Layer.static", "Layer.of_class", "Layer.method"])
def test_layers_are_found_through_proxies_and_descriptors(module, name):
    owner, _, attribute = name.rpartition(".")
    raw = inspect.getattr_static(getattr(module, owner) if owner else module, attribute)
    inner = wrapt.FunctionWrapper(raw, lambda f, _, a, k: f(*a, **k))
    outer = wrapt.FunctionWrapper(inner, lambda f, _, a, k: f(*a, **k))
    assert _layers.holds(outer, inner)
    assert not _layers.holds(inner, outer)


@SEAMS
def test_an_object_from_before_a_reload_gives_the_original_after_a_revert(bench, module, seam):
    bench.arm(method_target("Layer.method", seam))
    before = module.Layer()
    importlib.reload(module)
    assert before.method(1) == module.Layer().method(1) == ["ours", "method", 1]
    bench.applier.revert("demo")
    assert before.method(1) == module.Layer().method(1) == ["method", 1]


@SEAMS
def test_what_a_stranger_holds_of_an_old_class_is_not_taken_for_the_new_one(bench, module, seam):
    bench.arm(method_target("Layer.method", seam))
    module.Layer.method = foreign(module.Layer.method)
    bench.applier.revert("demo")
    importlib.reload(module)
    bench.applier.apply_again("demo", sys.modules)
    assert module.Layer().method(1) == ["ours", "method", 1]
