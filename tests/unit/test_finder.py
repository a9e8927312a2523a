"""The finder in the situations that an import system can be in."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import sys
import threading
import types
import zipfile
from collections.abc import Callable
from importlib import resources
from importlib.machinery import ModuleSpec, SourceFileLoader

import pytest

from ascend_patch._finder import Finder, Watch

BOTH = ["before ap_m", "after ap_m value=1"]


def test_a_miss_answers_none(site):
    assert site.finder.find_spec("ap_nobody_watches") is None


def test_a_watched_module_is_called_back_before_and_after_its_code(site):
    site.write("ap_m")
    assert site.watch("ap_m") is False
    importlib.import_module("ap_m")
    assert site.calls == BOTH


def test_arming_twice_leaves_one_entry_in_meta_path(site):
    site.finder.arm()
    assert sys.meta_path.count(site.finder) == 1


def test_a_module_that_has_run_is_called_back_at_once(site):
    site.write("ap_m")
    importlib.import_module("ap_m")
    assert site.watch("ap_m") is True
    assert site.calls == ["after ap_m value=1"]


def test_a_circular_import_is_called_back_once_and_when_it_has_finished(site):
    site.write("ap_m", "value = 0\nimport ap_inner\nvalue = 1\n")
    site.write("ap_inner", "import ap_hook\nap_hook.run()\n")
    sys.modules["ap_hook"] = types.SimpleNamespace(run=lambda: site.watch("ap_m"))
    importlib.import_module("ap_m")
    assert site.calls == ["after ap_m value=1"]


def test_a_watch_added_while_our_own_loader_runs_the_module_is_called_once(site):
    site.write("ap_m", "value = 0\nimport ap_hook\nap_hook.run()\nvalue = 1\n")
    sys.modules["ap_hook"] = types.SimpleNamespace(run=lambda: site.watch("ap_m"))
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.calls.count("after ap_m value=1") == len(site.calls) - 1 == 2


def test_a_watch_added_by_a_callback_of_the_same_module_is_called_once(site):
    site.write("ap_m")
    site.finder.watch("ap_m", Watch(after=lambda _: site.watch("ap_m")))
    importlib.import_module("ap_m")
    assert site.calls == ["after ap_m value=1"]


def test_a_module_that_another_thread_is_importing_is_called_back_when_it_has_finished(site):
    site.write(
        "ap_m", "value = 0\nimport ap_hook\nap_hook.started.set()\nap_hook.go.wait(20)\nvalue = 1\n"
    )
    hook = types.SimpleNamespace(started=threading.Event(), go=threading.Event())
    sys.modules["ap_hook"] = hook
    thread = threading.Thread(target=importlib.import_module, args=("ap_m",))
    thread.start()
    assert hook.started.wait(20)
    site.watch("ap_m")
    assert site.calls == []
    hook.go.set()
    thread.join(20)
    assert site.calls == ["after ap_m value=1"]


def test_a_half_imported_module_serves_two_finders(site):
    second = Finder(lambda name, error: site.errors.append((name, error)))
    site.write("ap_m", "value = 0\nimport ap_hook\nap_hook.run()\nvalue = 1\n")
    both = lambda: (site.watch("ap_m"), site.watch("ap_m", second))  # noqa: E731
    sys.modules["ap_hook"] = types.SimpleNamespace(run=both)
    importlib.import_module("ap_m")
    assert site.calls == ["after ap_m value=1"] * 2


def test_a_failed_import_is_not_called_back_and_the_next_one_is(site):
    path = site.write("ap_m", "raise ValueError('not yet')\n")
    site.watch("ap_m")
    with pytest.raises(ValueError, match="not yet"):
        importlib.import_module("ap_m")
    assert site.calls == ["before ap_m"]
    path.write_text("value = 1  # of another length\n")
    importlib.invalidate_caches()
    importlib.import_module("ap_m")
    assert site.calls == ["before ap_m", *BOTH]


def test_a_half_imported_module_that_fails_is_not_called_back(site):
    site.write("ap_m", "import ap_hook\nap_hook.run()\nraise ValueError('no')\n")
    sys.modules["ap_hook"] = types.SimpleNamespace(run=lambda: site.watch("ap_m"))
    with pytest.raises(ValueError, match="no"):
        importlib.import_module("ap_m")
    assert site.calls == []


def test_a_reload_is_called_back_again(site):
    site.write("ap_m")
    site.watch("ap_m")
    importlib.reload(importlib.import_module("ap_m"))
    assert site.calls == BOTH * 2


def test_deleting_and_importing_again_is_called_back_again(site):
    site.write("ap_m")
    site.watch("ap_m")
    importlib.import_module("ap_m")
    del sys.modules["ap_m"]
    importlib.import_module("ap_m")
    assert site.calls == BOTH * 2


def test_a_probe_calls_nothing_back(site):
    site.write("ap_m")
    site.watch("ap_m")
    assert importlib.util.find_spec("ap_m") is not None
    assert site.calls == []


def test_the_loader_of_a_probe_passes_for_the_original(site):
    path = site.write("ap_m")
    site.watch("ap_m")
    loader = importlib.util.find_spec("ap_m").loader
    assert isinstance(loader, SourceFileLoader)
    assert loader.get_source("ap_m") == path.read_text()
    assert loader == SourceFileLoader("ap_m", str(path))


def test_two_probes_give_equal_specs(site):
    site.write("ap_m")
    site.watch("ap_m")
    assert importlib.util.find_spec("ap_m") == importlib.util.find_spec("ap_m")


def test_a_module_keeps_its_original_loader(site):
    site.write("ap_m")
    site.watch("ap_m")
    module = importlib.import_module("ap_m")
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_source_and_data_of_a_watched_package_can_be_read(site):
    site.write("ap_p.__init__", "def f():\n    return 1\n")
    (site.folder / "ap_p" / "data.txt").write_text("data")
    site.watch("ap_p")
    package = importlib.import_module("ap_p")
    assert inspect.getsource(package.f) == "def f():\n    return 1\n"
    assert pkgutil.get_data("ap_p", "data.txt") == b"data"
    assert (resources.files("ap_p") / "data.txt").read_text() == "data"


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("imported", [False, True], ids=["probed", "imported"])
def test_a_spec_can_be_duplicated(site, duplicate: Callable[[ModuleSpec], ModuleSpec], imported):
    site.write("ap_m")
    site.watch("ap_m")
    spec = (
        importlib.import_module("ap_m").__spec__ if imported else importlib.util.find_spec("ap_m")
    )
    again = duplicate(spec)
    module = importlib.util.module_from_spec(again)
    again.loader.exec_module(module)
    assert module.value == 1


def test_a_namespace_package_ends_with_an_ordinary_spec(site):
    (site.folder / "ap_n").mkdir()
    importlib.invalidate_caches()
    site.watch("ap_n")
    assert type(importlib.import_module("ap_n").__spec__) is ModuleSpec


def test_a_namespace_package_is_called_back(site):
    (site.folder / "ap_n").mkdir()
    importlib.invalidate_caches()
    site.watch("ap_n")
    importlib.import_module("ap_n")
    assert site.calls == ["after ap_n value=None"]


def test_a_zipped_package_is_called_back(site):
    with zipfile.ZipFile(site.folder / "z.zip", "w") as archive:
        archive.writestr("ap_m.py", "value = 1\n")
    sys.path.insert(0, str(site.folder / "z.zip"))
    site.watch("ap_m")
    importlib.import_module("ap_m")
    assert site.calls == BOTH
