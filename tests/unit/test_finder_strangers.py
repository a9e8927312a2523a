"""The finder beside other finders and loaders, under threads, and with callbacks that fail."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
import threading
import types

import pytest

from ascend_patch._finder import Finder, Watch
from ascend_patch._runtime import Refusal

BOTH = ["before ap_m", "after ap_m value=1"]


@pytest.fixture
def stranger():
    """Put a finder into sys.meta_path, and take it out again."""
    added = []

    def add(find_spec, position: int) -> None:
        finder = types.SimpleNamespace(find_spec=find_spec)
        added.append(finder)
        sys.meta_path.insert(position, finder)

    yield add
    for finder in added:
        sys.meta_path.remove(finder)


def file_spec(site, name: str = "ap_m"):
    return importlib.util.spec_from_file_location(name, site.folder / f"{name}.py")


def lazily(name: str) -> types.ModuleType:
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_lazy_module_is_called_back_when_it_is_first_used(site):
    site.write("ap_m")
    site.watch("ap_m")
    module = lazily("ap_m")
    assert site.calls == []
    assert module.value == 1
    assert site.calls == BOTH


def test_watching_a_lazy_module_does_not_run_it(site):
    site.write("ap_m")
    module = lazily("ap_m")
    assert site.watch("ap_m") is False
    assert site.calls == []
    assert module.value == 1
    assert site.calls == BOTH


def test_a_legacy_loader_is_called_back(site, stranger):
    class Legacy:
        def load_module(self, name):
            module = sys.modules[name] = types.ModuleType(name)
            module.value = 1
            return module

    legacy = Legacy()
    stranger(
        lambda name, *_: importlib.util.spec_from_loader(name, legacy) if name == "ap_m" else None,
        1,
    )
    site.watch("ap_m")
    module = importlib.import_module("ap_m")
    assert site.calls == BOTH
    assert module.__loader__ is module.__spec__.loader is legacy


def test_a_finder_behind_us_may_ask_importlib_for_the_same_name(site, stranger):
    site.write("ap_m")
    asked = []

    def find_spec(name, *_):
        if name != "ap_m" or asked:
            return None
        asked.append(name)
        return importlib.util.find_spec(name)

    stranger(find_spec, 1)
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert asked == ["ap_m"]
    assert site.calls == BOTH


def test_a_finder_behind_us_may_return_the_same_spec_twice(site, stranger):
    site.write("ap_m")
    kept = file_spec(site)
    stranger(lambda name, *_: kept if name == "ap_m" else None, 1)
    site.watch("ap_m")
    importlib.util.find_spec("ap_m")
    importlib.import_module("ap_m")
    assert site.calls == BOTH


def test_two_finders_of_ours_each_call_back_once(site):
    site.write("ap_m")
    second = Finder(lambda name, error: site.errors.append((name, error)))
    site.watch("ap_m")
    site.watch("ap_m", second)
    second.arm()
    try:
        module = importlib.import_module("ap_m")
    finally:
        second.disarm()
    assert sorted(site.calls) == sorted(BOTH * 2)
    assert "ascend" not in type(module.__loader__).__module__


def test_a_finder_in_front_of_us_is_not_noticed_until_the_sweep(site, stranger):
    site.write("ap_m")
    stranger(lambda name, *_: file_spec(site) if name == "ap_m" else None, 0)
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.calls == []
    assert site.finder.sweep() == ["ap_m"]
    assert site.calls == ["after ap_m value=1"]


def test_a_sweep_does_not_call_back_twice(site):
    site.write("ap_m")
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.finder.sweep() == []
    assert site.calls == BOTH


def test_a_spec_of_a_class_of_its_own_is_left_to_the_sweep(site):
    class OwnSpec(importlib.machinery.ModuleSpec):
        pass

    spec = OwnSpec("ap_m", None)
    spec._initializing = True
    module = sys.modules["ap_m"] = types.ModuleType("ap_m")
    module.__spec__ = spec
    site.watch("ap_m")
    assert type(spec) is OwnSpec
    assert site.finder.sweep() == []
    spec._initializing = False
    assert site.finder.sweep() == ["ap_m"]


def test_a_module_that_replaces_itself_is_called_back_with_its_replacement(site):
    site.write(
        "ap_m",
        "import sys, types\n"
        "sys.modules[__name__] = new = types.ModuleType(__name__)\nnew.value = 1\n",
    )
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.calls == BOTH


def test_run_as_main_is_no_import_of_the_module(site):
    site.write("ap_p.__init__", "value = 1\n")
    site.write("ap_p.mod", "value = 2\n")
    site.watch("ap_p")
    site.watch("ap_p.mod")
    assert runpy.run_module("ap_p.mod", run_name="__main__")["value"] == 2
    assert site.calls == ["before ap_p", "after ap_p value=1"]


def test_an_unwatched_name_is_a_miss_again(site):
    watch = Watch()
    site.finder.watch("ap_m", watch)
    site.finder.unwatch([watch])
    site.write("ap_m")
    assert site.finder.find_spec("ap_m") is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [ValueError, SystemExit, GeneratorExit])
def test_a_callback_that_raises_does_not_break_the_import_and_is_told(site, when, error):
    def callback(_):
        raise error("from a callback")

    site.write("ap_m")
    site.finder.watch("ap_m", Watch(**{when: callback}))
    assert importlib.import_module("ap_m").value == 1
    assert [(name, type(found)) for name, found in site.errors] == [("ap_m", error)]
    site.errors.clear()


def test_a_callback_that_raises_does_not_keep_the_others_from_being_called(site):
    def callback(_):
        raise ValueError("from a callback")

    site.write("ap_m")
    site.finder.watch("ap_m", Watch(after=callback))
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.calls == BOTH
    site.errors.clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Refusal("no")], ids=["ctrl-c", "refusal"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_and_a_refusal_end_the_import(site, when, error):
    def callback(_):
        raise error

    site.write("ap_m")
    site.finder.watch("ap_m", Watch(**{when: callback}))
    with pytest.raises(type(error)):
        importlib.import_module("ap_m")
    assert "ap_m" not in sys.modules


def test_ten_threads_that_import_at_once_all_see_the_module_patched(site):
    site.write("ap_m", "import time\ntime.sleep(0.05)\nvalue = 1\n")
    site.write("ap_o", "import time\ntime.sleep(0.05)\nimport ap_m\nvalue = ap_m.value\n")
    site.finder.watch("ap_m", Watch(after=lambda module: setattr(module, "value", 2)))
    site.watch("ap_m")
    site.watch("ap_o")
    start, seen = threading.Barrier(10), []

    def work(name: str) -> None:
        start.wait(20)
        seen.append(importlib.import_module(name).value)

    threads = [
        threading.Thread(target=work, args=(("ap_m", "ap_o")[i % 2],), daemon=True)
        for i in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert seen == [2] * 10
    assert sorted(site.calls) == [
        "after ap_m value=2",
        "after ap_o value=2",
        "before ap_m",
        "before ap_o",
    ]


def test_a_submodule_waits_for_what_is_done_before_its_package(site):
    """Python itself lets another thread import `ap_p.mod` while `ap_p` is half imported."""
    site.write("ap_p.__init__", "value = 1\n")
    site.write("ap_p.mod", "value = 2\n")
    begun, decided = threading.Event(), threading.Event()

    def begin(_):
        begun.set()
        decided.wait(20)
        site.watch("ap_p.mod")

    site.finder.watch("ap_p", Watch(before=begin))
    names = ("ap_p", "ap_p.mod")
    threads = [
        threading.Thread(target=importlib.import_module, args=(name,), daemon=True)
        for name in names
    ]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    decided.set()
    for thread in threads:
        thread.join(20)
    assert site.calls == ["before ap_p.mod", "after ap_p.mod value=2"]
