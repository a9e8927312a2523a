"""Faults put into patches: vLLM runs as it was, the state says why, nothing is half-applied."""

from __future__ import annotations

import pytest

IMPORT = """
import importlib, json
import vllm.user, vllm.more
from vllm.ops import Layer
print(json.dumps({
    "f": vllm.user.call(1), "forward": Layer().forward(1), "g": vllm.more.g(1),
}))
"""
UNTOUCHED = {"f": ["f", 1], "forward": ["forward", 1], "g": ["g", 1]}
PATCHED = {name: ["ours", *value] for name, value in UNTOUCHED.items()}
OTHER = ', patch("other", target("vllm.more:g"))'


def test_without_faults_every_target_is_patched_once(host):
    host.patches(
        'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"),'
        ' target("vllm.ops:Layer.forward"))' + OTHER
    )
    found = host.run(IMPORT)
    assert found.value == PATCHED
    assert {p["id"]: p["state"] for p in found.state["patches"]} == {
        "demo": "applied",
        "other": "applied",
    }
    assert found.state["problems"] == []


FAULTS = {
    "replacement module missing": ("host", "nowhere:outer", "ModuleNotFoundError"),
    "replacement missing": ("host", "replacements:nothing", "AttributeError"),
    "factory raises": ("traced", "replacements:raises_value_error", "a fault was put here"),
    "factory exits": ("traced", "replacements:raises_system_exit", "SystemExit: 3"),
    "factory closes": ("traced", "replacements:raises_generator_exit", "GeneratorExit"),
    "other parameters": ("traced", "replacements:other_parameters", "f takes (x), our replac"),
}


@pytest.mark.parametrize("position", ["first", "second", "later module"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_host_as_it_was(host, fault, position):
    seam, replacement, reason = FAULTS[fault]
    bad = f'target("vllm.ops:f", "{seam}", "{replacement}")'
    good = 'target("vllm.ops:Layer.forward")'
    if position == "later module":
        bad = bad.replace("vllm.ops:f", "vllm.user:call")
        reason = reason.replace("f takes", "call takes")
    targets = f"{bad}, {good}" if position == "first" else f"{good}, {bad}"
    host.patches(f'patch("demo", {targets})' + OTHER)
    found = host.run(IMPORT, fails=True)
    assert found.code == 0, found.err
    assert found.value == {**UNTOUCHED, "g": ["ours", "g", 1]}
    assert found.patch("demo")["state"] == "failed"
    assert reason in found.patch("demo")["reason"]
    assert {t["state"] for t in found.patch("demo")["targets"]} == {"failed", "reverted"}
    assert found.patch("other")["state"] == "applied"
    assert reason in found.err


@pytest.fixture
def moved(host):
    """A release whose sources on disk agree, and that runs something else: f is deleted."""
    host.patches('patch("demo", target("vllm.ops:Layer.forward"), target("vllm.ops:f"))' + OTHER)
    return (
        "import json, vllm, sys\n"
        "from pathlib import Path\n"
        "path = Path(vllm.__file__).with_name('ops.py')\n"
        "path.write_text(path.read_text() + '\\ndel f\\n')\n"
        "import vllm.ops, vllm.more\n"
        "print(json.dumps([vllm.ops.Layer().forward(1), hasattr(vllm.ops, 'f')]))\n"
    )


def test_a_target_that_is_gone_when_its_module_has_run_fails_the_patch(host, moved):
    found = host.run(moved, fails=True)
    assert found.value == [["forward", 1], False]
    assert "vllm.ops has no f" in found.patch("demo")["reason"]
    assert found.patch("other")["state"] == "applied"


def test_a_source_that_drifted_is_skipped_and_the_difference_is_named(host):
    host.patches('patch("demo", target("vllm.ops:f"))' + OTHER)
    host.write("vllm.ops", "def f(x, y=1):\n    return ['f', x]\n")
    found = host.run("import vllm.ops, json; print(json.dumps(vllm.ops.f(1)))")
    assert found.value == ["f", 1]
    assert found.patch("demo")["state"] == "skipped"
    assert "f: its parameters are (x, y=1), recorded for 1.0 (x)" in found.patch("demo")["reason"]


def test_a_release_that_was_never_recorded_fails_its_patch_only(host):
    host.patches(
        'Patch("demo", "1", "s", "w", "u", "r",'
        ' (Band("vllm", "==1.0", ("9.9",), (target("vllm.ops:f"),)),))' + OTHER
    )
    found = host.run(IMPORT, fails=True)
    assert found.value == {**UNTOUCHED, "g": ["ours", "g", 1]}
    assert found.patch("demo")["state"] == "failed"
    assert "vllm 9.9 is not recorded" in found.patch("demo")["reason"]


def test_what_requires_a_patch_that_fails_is_taken_back_with_it(host):
    host.patches(
        'patch("base", target("vllm.ops:f", "traced", "replacements:raises_value_error")),'
        ' patch("needs", target("vllm.more:g"), requires=("base",))'
    )
    found = host.run("import vllm.more, vllm.ops, json; print(json.dumps(vllm.more.g(1)))", fails=1)
    assert found.value == ["g", 1]
    assert "it needs patch base, which failed" in found.patch("needs")["reason"]


def test_a_registry_that_cannot_be_read_leaves_vllm_untouched(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    breaks = "def _broken():\n    raise ValueError('two patches share an id')\n"
    (host.site / "fakepatches.py").open("a").write(f"\n{breaks}\n_registry.load = _broken\n")
    found = host.run(IMPORT, fails=True)
    assert found.value == UNTOUCHED
    assert found.patch("all")["state"] == "failed"
    assert "two patches share an id" in found.patch("all")["reason"]


BLOCK = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("names", [["wrapt"], ["packaging"], ["wrapt", "packaging"]])
def test_without_a_dependency_vllm_runs_untouched(host, names):
    host.patches('patch("demo", target("vllm.ops:f"))')
    # The door of this test imports what the shim imports later; open it with nothing declared.
    found = host.run(BLOCK.format(names=names) + IMPORT, fails=True)
    assert found.value == UNTOUCHED
    assert found.patch("all")["state"] == "failed"
    assert found.patch("all")["reason"].startswith(f"{' and '.join(names)} is missing")


# STRICT


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ascend-patch:")]


def test_strict_refuses_when_vllm_is_imported_and_in_one_line(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    host.write("vllm.ops", "def f(x, y=1):\n    return ['f', x]\n")
    found = host.run("import vllm\nprint('it started')", fails=True, ASCEND_PATCHES_STRICT="1")
    assert found.code == 1
    assert found.out == ""
    assert len(lines(found.err)) == len(found.err.splitlines()) == 1
    assert found.patch("demo")["reason"] in found.err


def test_strict_refuses_again_where_the_first_refusal_was_swallowed(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    host.write("vllm.ops", "def f(x, y=1):\n    return ['f', x]\n")
    script = (
        "try:\n    import vllm\nexcept SystemExit:\n    print('swallowed')\n"
        "import vllm\nprint('it started')\n"
    )
    found = host.run(script, fails=True, ASCEND_PATCHES_STRICT="1")
    assert (found.code, found.out) == (1, "swallowed\n")


def test_strict_refuses_where_the_shim_itself_has_a_fault(host):
    (host.site / "fakepatches.py").open("a").write("\n_registry.load = lambda: 1 / 0\n")
    found = host.run("import vllm\nprint('it started')", fails=True, ASCEND_PATCHES_STRICT="1")
    assert (found.code, found.out) == (1, "")
    assert "ZeroDivisionError" in found.err


@pytest.mark.parametrize(("strict", "code", "out"), [("0", 0, "model\n"), ("1", 1, "")])
def test_what_fails_while_modules_are_imported_is_refused_when_the_model_is_loaded(
    host, strict, code, out
):
    host.patches('patch("demo", target("vllm.ops:f", "traced", "replacements:raises_value_error"))')
    script = (
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "print(get_model_loader().load_model())\n"
    )
    found = host.run(script, fails=True, ASCEND_PATCHES_STRICT=strict)
    assert (found.code, found.out) == (code, out)
    assert found.state["model_loaded"] is True
    assert ("STRICT=1 and patch demo is failed" in found.err) is (strict == "1")


def test_strict_serves_what_can_be_applied_and_what_is_never_imported(host):
    host.patches('patch("demo", target("vllm.ops:f"))' + OTHER)
    script = (
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "print(get_model_loader().load_model())\n"
    )
    found = host.run(script, ASCEND_PATCHES_STRICT="1")
    assert found.patch("demo")["state"] == "applied"
    assert found.patch("other")["state"] == "armed"


def test_an_unknown_name_is_one_line_and_a_refusal_from_vllm_only(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    found = host.run("print('fine')", ASCEND_PATCHES="dem")
    assert (found.out, found.err, found.states) == ("fine\n", "", [])
    found = host.run("import vllm", fails=True, ASCEND_PATCHES="dem")
    assert found.code == 1
    assert len(found.err.splitlines()) == 1
    assert "Did you mean `demo`?" in found.err


def test_a_patch_that_was_asked_for_by_name_is_missed_loudly(host):
    host.patches('patch("demo", target("vllm.ops:f"), versions="==2.0")')
    found = host.run("import vllm", ASCEND_PATCHES="demo")
    assert "WARNING: patch demo was asked for and is skipped: vllm 1.0 is outside" in found.err


REPLACED = """
import types
import vllm.ops
from vllm.model_executor.model_loader import get_model_loader
def theirs(x):
    return ["theirs"]
vllm.ops.f = types.FunctionType(theirs.__code__, {"__name__": "stranger.lib"}, "theirs")
get_model_loader().load_model()
print("it serves", vllm.ops.f(1))
"""


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_target_that_somebody_replaced_is_hidden_and_strict_refuses_it(host, strict):
    host.patches('patch("demo", target("vllm.ops:f"))')
    found = host.run(REPLACED, fails=True, ASCEND_PATCHES_STRICT=strict)
    reason = "replaced by theirs of stranger.lib after we had applied; that is in force"
    assert (found.code, found.out) == ((1, "") if strict == "1" else (0, "it serves ['theirs']\n"))
    assert f"demo: vllm.ops:f is {reason}" in found.err
    refused = "ASCEND_PATCHES_STRICT=1 and patch demo is hidden: vllm.ops:f is replaced by theirs"
    assert (refused in found.err) is (strict == "1")
    (patch,) = found.state["patches"]
    assert patch["targets"][0]["state"] == "hidden"
    assert patch["targets"][0]["reason"].startswith(reason)
