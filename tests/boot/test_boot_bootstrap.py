"""The bootstrap by itself: late doors, neighbours that unload or disarm it, refusals."""

from __future__ import annotations

import sys

import pytest
from house import start

BEGIN = """
import os, sys, types
from ascend_patch import _bootstrap
calls = []
runtime = types.ModuleType("ascend_patch._runtime")
runtime.begin = calls.append
runtime.record_internal_error = lambda *_: None
runtime.current = lambda: types.SimpleNamespace(look_again=lambda: None)
sys.modules["ascend_patch._runtime"] = runtime
import ascend_patch; ascend_patch._runtime = runtime
"""


@pytest.fixture
def python(checkout, fake_vllm):
    """Run code behind BEGIN with an open door, a fake vLLM and a runtime that only counts."""

    def run(code, **environ):
        environ = {"ASCEND_PATCHES": "all", **environ}
        words = [sys.executable, "-c", BEGIN + code]
        done = start(words, path=(checkout, fake_vllm), **environ)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_vllm_begins_the_runtime_once_before_its_code(python):
    done = python("import vllm; print(len(calls), calls[0].name)")
    assert done.stdout.split()[-1] == "vllm"


def test_the_plugin_arms_late_and_finds_vllm_imported(python):
    done = python(
        "from ascend_patch import _plugin\n"
        "import vllm; print(_bootstrap.doors, len(calls))\n"
        "os.environ['ASCEND_PATCHES'] = 'all'\n"
        "_plugin.load(); print(_bootstrap.doors, len(calls), calls[0].name)\n",
        ASCEND_PATCHES="",
    )
    assert done.stdout.splitlines() == ["[] 0", "['plugin'] 1 vllm"]


def test_the_plugin_puts_back_a_finder_that_was_taken_out(python):
    done = python(
        "from ascend_patch import _plugin\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f is not _bootstrap.finder()]\n"
        "import vllm; print(len(calls))\n"
        "_plugin.load(); print(len(calls), sys.meta_path[0] is _bootstrap.finder())\n"
    )
    assert done.stdout.splitlines() == ["0", "1 True"]


def test_unloaded_modules_do_not_arm_a_second_finder(python):
    done = python(
        "for name in [n for n in sys.modules if n.startswith('ascend_patch')]:\n"
        "    del sys.modules[name]\n"
        "from ascend_patch import _bootstrap as again\n"
        "again.open_door('plugin')\n"
        "print(again is _bootstrap, again.finder() is _bootstrap.finder())\n"
        "print(sum(type(f).__name__ == 'Finder' for f in sys.meta_path))\n"
    )
    assert done.stdout.splitlines() == ["False True", "1"]


def test_a_refusal_reaches_the_plugin(python):
    done = python(
        "class Refusal(SystemExit): ascend_patch_fatal = True\n"
        "def refuse(_): raise Refusal('no')\n"
        "import vllm\n"
        "runtime.begin = refuse\n"
        "os.environ['ASCEND_PATCHES'] = 'all'\n"
        "from ascend_patch import _plugin\n"
        "try: _plugin.load()\n"
        "except SystemExit as error: print(error)\n",
        ASCEND_PATCHES="",
    )
    assert done.stdout.strip() == "no"


def test_a_fault_in_the_runtime_is_one_line_and_vllm_is_imported(python):
    done = python(
        "def fail(_): raise ValueError('boom')\n"
        "runtime.begin = fail\n"
        "import vllm; print(vllm.__version__)\n"
    )
    assert done.stdout.strip() == "0.18.0"
    assert "ValueError: boom" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_value_survives_an_emptied_environment(python):
    done = python(
        "os.environ.clear(); print(_bootstrap.value())\n"
        "os.environ['ASCEND_PATCHES'] = 'none'; print(_bootstrap.value())\n",
        ASCEND_PATCHES="rotary",
    )
    assert done.stdout.split() == ["rotary", "none"]


@pytest.mark.parametrize("stderr", ["None", "open(os.devnull)"])
def test_complaining_never_fails(python, stderr):
    python(f"sys.stderr = {stderr}; _bootstrap.complain('x')")


def test_complaining_into_a_closed_stderr(python):
    python("sys.stderr.close(); _bootstrap.complain('x'); sys.stderr = None")
