"""Every process that imports vLLM: forked, spawned, from a fork server, threaded, late."""

from __future__ import annotations

import pytest

BOTH = (
    'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"), target("vllm.more:g"))'
)
CHILDREN = """
import json, multiprocessing, sys
sys.path.insert(0, {folder!r})

def work(queue):
    import os
    import vllm.user, vllm.more
    queue.put([os.getpid(), vllm.user.call(1), vllm.more.g(1)])

if __name__ == "__main__":
    {first}
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    children = [context.Process(target=work, args=(queue,), name=f"Worker-{{i}}") for i in (0, 1)]
    for child in children:
        child.start()
    found = [queue.get(timeout=30) for _ in children]
    for child in children:
        child.join(30)
    print(json.dumps(sorted(found)))
"""
IMPORTED = "import vllm.user, vllm.more; vllm.user.call(0)"


def states_of_children(found) -> dict[int, dict]:
    return {state["pid"]: state for state in found.states if state["role"].startswith("Worker")}


@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("spawn", "pass"),
        ("spawn", IMPORTED),
        ("fork", "pass"),
        ("fork", IMPORTED),
        ("forkserver", "pass"),
        ("forkserver", "multiprocessing.set_forkserver_preload(['vllm.user', 'vllm.more'])"),
    ],
    ids=lambda value: {"pass": "fresh", IMPORTED: "imported before"}.get(value, value[:11]),
)
def test_each_process_applies_each_target_once_and_says_so(host, method, first):
    host.patches(BOTH)
    found = host.run(CHILDREN.format(folder=str(host.folder), method=method, first=first))
    assert [value[1:] for value in found.value] == [[["ours", "f", 1], ["ours", "g", 1]]] * 2
    children = states_of_children(found)
    assert sorted(children) == [value[0] for value in found.value]
    for state in children.values():
        assert [p["state"] for p in state["patches"]] == ["applied"]
        assert [t["state"] for t in state["patches"][0]["targets"]] == ["applied"] * 2
        assert state["problems"] == []


def test_all_processes_of_a_run_share_one_directory(host):
    host.patches(BOTH)
    found = host.run(CHILDREN.format(folder=str(host.folder), method="spawn", first=IMPORTED))
    assert len(found.states) == 3
    assert len(list(host.status.glob("ascend-patch-*/*"))) == 1


def test_a_forked_child_counts_from_zero_and_leaves_its_parents_counts_alone(host):
    host.patches(BOTH)
    script = (
        "import os, json\nimport vllm.ops, ascend_patch\n"
        "calls = lambda: ascend_patch.status()['patches'][0]['targets'][0]['calls']\n"
        "vllm.ops.f(1), vllm.ops.f(1)\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    before = calls()\n    vllm.ops.f(1)\n"
        "    os.write(write, json.dumps([before, calls()]).encode())\n    os._exit(0)\n"
        "os.wait()\nvllm.ops.f(1)\n"
        "print(json.dumps([json.loads(os.read(read, 99)), calls()]))\n"
    )
    assert host.run(script).value == [[0, 1], 3]


def test_a_fork_while_another_thread_holds_every_lock_does_not_hang_the_child(host):
    host.patches(BOTH)
    script = (
        "import os, threading\nimport vllm.ops, ascend_patch\n"
        "from ascend_patch import _runtime\n"
        "runtime = _runtime.current()\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with runtime._decision._lock, runtime._applier._lock, runtime.state._lock:\n"
        "        with runtime.state.counters._lock:\n"
        "            held.set(); done.wait(20)\n"
        "threading.Thread(target=hold).start()\nheld.wait(20)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    import signal; signal.alarm(20)\n"
        "    import vllm.more\n    ascend_patch.revert('demo')\n"
        "    runtime.state.counters.counter('new')()\n"
        "    os._exit(0 if vllm.more.g(1) == ['g', 1] else 1)\n"
        "status = os.waitpid(child, 0)[1]\ndone.set()\nprint(status)\n"
    )
    assert host.run(script).value == 0


def test_ten_threads_that_import_the_targets_at_once_apply_each_once(host):
    host.patches(BOTH)
    for module in ("vllm.ops", "vllm.more"):
        path = host.site.joinpath(*module.split(".")).with_suffix(".py")
        path.write_text(path.read_text() + "\nimport time; time.sleep(0.05)\n")
    host.record()
    script = (
        "import importlib, json, threading\n"
        "start, found = threading.Barrier(10), []\n"
        "def work(i):\n"
        "    start.wait(20)\n"
        "    name, function = [('vllm.ops', 'f'), ('vllm.more', 'g')][i % 2]\n"
        "    found.append(getattr(importlib.import_module(name), function)(1)[0])\n"
        "threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(10)]\n"
        "[t.start() for t in threads], [t.join(30) for t in threads]\n"
        "import vllm.ops, vllm.more\n"
        "print(json.dumps([found, vllm.ops.f(1), vllm.more.g(1)]))\n"
    )
    found = host.run(script)
    assert found.value == [["ours"] * 10, ["ours", "f", 1], ["ours", "g", 1]]
    assert found.patch("demo")["state"] == "applied"
    assert found.state["problems"] == []


THREADS = """
import importlib, json, threading
# Ours of the first target imports the module of the second: the locks cross.
start = threading.Barrier(2)
def work(name):
    start.wait(20)
    importlib.import_module(name)
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in ("vllm.ops", "vllm.more")]
[t.start() for t in threads], [t.join(30) for t in threads]
print(json.dumps([t.is_alive() for t in threads]))
import vllm.ops, vllm.more
print(json.dumps([vllm.ops.f(1)[0], vllm.more.g(1)[0]]))
"""


def test_replacements_that_import_each_others_targets_do_not_deadlock(host):
    ours = "import time; time.sleep(0.05)\nimport {other}\nfrom replacements import outer\n"
    host.write("ours_ops", ours.format(other="vllm.more"))
    host.write("ours_more", ours.format(other="vllm.ops"))
    host.patches(
        'patch("demo", target("vllm.ops:f", replacement="ours_ops:outer"),'
        ' target("vllm.more:g", replacement="ours_more:outer"))'
    )
    found = host.run(THREADS)
    assert found.out == '[false, false]\n["ours", "ours"]\n'


@pytest.mark.parametrize("bad", ["f", "g"])
def test_of_two_modules_imported_at_once_none_is_left_half_applied(host, bad):
    symbols = {"f": "vllm.ops:f", "g": "vllm.more:g"}
    targets = ", ".join(
        f'target("{symbol}", "traced", "ours:{"bad" if name == bad else "good"}")'
        for name, symbol in symbols.items()
    )
    host.write(
        "ours",
        "import time\ndef bad(original):\n    time.sleep(0.02)\n    raise ValueError('a fault')\n"
        "def good(original):\n    time.sleep(0.02)\n    return lambda x: ['ours', *original(x)]\n",
    )
    host.patches(f'patch("demo", {targets})')
    found = host.run(THREADS, fails=True)
    assert found.out == '[false, false]\n["f", "g"]\n'
    assert found.patch("demo")["state"] == "failed"
    assert {t["state"] for t in found.patch("demo")["targets"]} == {"failed", "reverted"}


def test_a_process_that_does_not_import_vllm_writes_nothing(host):
    host.patches(BOTH)
    found = host.run("print('fine')")
    assert found.states == []


# The late door

LATE = """
import json
import vllm.user, vllm.more
before = vllm.user.call(1)
import fakepatches
from ascend_patch import _plugin
_plugin.load()
_plugin.load()
print(json.dumps([before, vllm.user.call(1), vllm.more.g(1)]))
"""


def test_the_plugin_arms_late_and_the_state_says_so(host):
    host.patches(BOTH)
    found = host.run(LATE, FAKE_DOOR="closed")
    assert found.value == [["f", 1], ["ours", "f", 1], ["ours", "g", 1]]
    assert found.state["door"] == "plugin"
    assert found.patch("demo")["state"] == "applied"
    assert found.patch("demo")["notes"] == [
        f"{module} had been imported before; objects built by then keep the original"
        for module in ("vllm.ops", "vllm.more")
    ]


def test_where_the_door_was_open_the_plugin_changes_nothing(host):
    host.patches(BOTH)
    script = "import json, vllm.ops\nfrom ascend_patch import _plugin\n_plugin.load()\n"
    found = host.run(script + "print(json.dumps(vllm.ops.f(1)))")
    assert found.value == ["ours", "f", 1]
    assert (found.state["door"], found.patch("demo")["notes"]) == ("sitecustomize", [])


def test_what_came_in_past_the_finder_is_found_when_the_model_is_loaded(host):
    host.patches(BOTH)
    script = (
        "import importlib.util, json, sys, vllm\n"
        "class Stranger:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vllm.ops':\n"
        "            return importlib.util.spec_from_file_location(name, path[0] + '/ops.py')\n"
        "sys.meta_path.insert(0, Stranger())\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "import vllm.ops; before = vllm.ops.f(1)\n"
        "get_model_loader().load_model()\n"
        "print(json.dumps([before, vllm.ops.f(1)]))\n"
    )
    found = host.run(script)
    assert found.value == [["f", 1], ["ours", "f", 1]]
    assert found.patch("demo")["notes"][0].startswith("vllm.ops had been imported before")


def test_what_came_in_past_the_finder_is_found_by_the_plugin_before_that(host):
    host.patches(BOTH)
    script = (
        "import importlib.util, json, sys, vllm\n"
        "class Stranger:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vllm.ops':\n"
        "            return importlib.util.spec_from_file_location(name, path[0] + '/ops.py')\n"
        "sys.meta_path.insert(0, Stranger())\n"
        "from ascend_patch import _plugin\n"
        "import vllm.ops; before = vllm.ops.f(1)\n"
        "_plugin.load()\n"
        "print(json.dumps([before, vllm.ops.f(1)]))\n"
    )
    found = host.run(script)
    assert found.value == [["f", 1], ["ours", "f", 1]]
    assert found.patch("demo")["notes"][0].startswith("vllm.ops had been imported before")


# Reverting in a process


@pytest.mark.parametrize("name", ["demo", "patch_demo", " Demo "])
def test_a_patch_is_taken_back_by_any_spelling_of_its_name(host, name):
    host.patches(BOTH)
    script = (
        f"import json, vllm.ops, ascend_patch\nascend_patch.revert({name!r})\n"
        "import vllm.more\nprint(json.dumps([vllm.ops.f(1), vllm.more.g(1)]))\n"
    )
    found = host.run(script)
    assert found.value == [["f", 1], ["g", 1]]
    assert found.patch("demo")["state"] == "reverted"
    assert {t["state"] for t in found.patch("demo")["targets"]} == {"reverted"}


def test_reverting_what_was_skipped_keeps_the_reason(host):
    host.patches('patch("demo", target("vllm.ops:f"), versions="==2.0")')
    found = host.run("import vllm, ascend_patch\nascend_patch.revert('demo')\n")
    assert found.patch("demo")["state"] == "skipped"
    assert "outside of the releases" in found.patch("demo")["reason"]


def test_an_unknown_name_names_the_known_ones(host):
    host.patches(BOTH)
    script = (
        "import vllm, ascend_patch\n"
        "try:\n    ascend_patch.revert('rotery')\nexcept KeyError as error:\n    print(error)\n"
    )
    assert "there is no patch 'rotery'; there are demo" in host.run(script).out
