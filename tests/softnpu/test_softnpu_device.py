"""The device itself: memory, tensors, streams, events, generators, graphs, several of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from softnpu_checks import names, results
from softnpu_environment import HERE, Environment

DEVICE = "checks_device.py"


@pytest.fixture(scope="module")
def checked(npu: Environment) -> dict[str, dict]:
    return results(npu, DEVICE, devices=2, SOFTNPU_MEMORY_GB="8")


@pytest.mark.parametrize("name", names(DEVICE))
def test_device(checked, name):
    assert checked[name]["passed"], checked[name]["value"]


def test_an_argument_that_is_copied_and_not_aliased_is_found(npu):
    """The control of the checks that write in place."""
    found = results(
        npu, DEVICE, "views_share_memory", "in_place_and_indexed_writes", "streams_and_events",
        devices=2, SOFTNPU_DEFECT="copied_argument",
    )  # fmt: skip
    assert not found["views_share_memory"]["passed"]
    assert not found["in_place_and_indexed_writes"]["passed"]
    assert found["streams_and_events"]["passed"]


def test_stubs_refuse_but_for_those_that_compute_nothing(npu):
    stubs = (npu.libraries / "stubs.cpp").read_text(encoding="utf-8")
    refusing = re.findall(r'^long (\w+)\(\) \{ refuse\("(.+)"\); return 0; \}$', stubs, re.M)
    silent = re.findall(r"^long (\w+)\(\) \{ return 0; \}$", stubs, re.M)
    print(len(refusing), "stubs refuse,", len(silent), "return 0:", *silent)
    assert len(refusing) > 100
    # Profiling, and AscendC kernels that announce themselves; nothing that computes.
    assert all(
        re.match(r"Msprof|rt(Dev|Reg|Function)|aclrtBinary(Load|UnLoad)", name) for name in silent
    ), silent


def test_a_call_past_the_dispatcher_stops_with_the_name(npu, tmp_path):
    """A small program that calls a stub as torch_npu would."""
    source = tmp_path / "call.cpp"
    source.write_text(
        "#include <cstdio>\n#include <stdexcept>\n"
        'extern "C" void *aclCreateTensorDesc(int, int, const long *, int);\n'
        "int main() { try { aclCreateTensorDesc(0, 0, nullptr, 0); }\n"
        ' catch (const std::runtime_error &e) { std::printf("%s", e.what()); return 7; } }\n'
    )
    program = tmp_path / "call"
    link = [f"-L{npu.libraries}", "-lsoftnpu_stubs", f"-Wl,-rpath,{npu.libraries}"]
    command = ["g++", str(source), "-o", str(program), *link]
    subprocess.run([*command, "-Wl,--unresolved-symbols=ignore-all"], check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done
    assert "aclCreateTensorDesc of CANN was called and is not implemented" in done.stdout


def test_the_trace_counts_operators_of_every_process(npu, tmp_path):
    code = """
import os, sys, subprocess, torch, torch_npu
x = torch.ones(3, device="npu")
for _ in range(int(sys.argv[1])):
    x.mul_(2)
if len(sys.argv) < 3:
    subprocess.run([sys.executable, __file__, "7", "child"], check=True)
"""
    script = tmp_path / "traced.py"
    script.write_text(code)
    trace = tmp_path / "trace"
    trace.mkdir()
    done = npu.run([str(script), "5"], seconds=120, SOFTNPU_TRACE=str(trace))
    assert done.returncode == 0, done.stderr[-3000:]
    counts = sorted(
        int(count)
        for file in trace.glob("operators-*.txt")
        for count, name in (line.split() for line in file.read_text().splitlines())
        if name == "aten::mul_.Tensor"
    )
    assert counts == [5, 7]


def test_no_binary_is_in_the_sources():
    for path in Path(HERE).rglob("*"):
        assert path.suffix not in (".so", ".o", ".a"), path
