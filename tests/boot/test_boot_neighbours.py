"""The real ddtrace, OpenTelemetry and coverage beside the shim: all of them loaded, ours too."""

from __future__ import annotations

import ast
import hashlib
import os
import sys

import pytest
from house import House, base_python, room, start

pytestmark = pytest.mark.slow

PACKAGES = ("ddtrace", "opentelemetry-distro", "coverage", "wrapt", "packaging")
# No agent, no exporter: nothing leaves this process.
QUIET = {
    "DD_TRACE_ENABLED": "false",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_SDK_DISABLED": "true",
}
SAY = """
import sys, vllm
boot = sys.modules["ascend_patch._bootstrap"]
import ascend_patch
dd = sys.modules.get("ddtrace.bootstrap.sitecustomize")
print("\\n" + repr({
    "doors": boot.doors,
    "armed": sum(type(f).__module__ == "ascend_patch._finder" for f in sys.meta_path),
    "begun": len(ascend_patch.status()["patches"]) > 0,
    "problems": ascend_patch.status()["problems"],
    "dd": getattr(dd, "loaded", None),
    "otel": "opentelemetry.instrumentation.auto_instrumentation" in sys.modules,
    "coverage": "coverage" in sys.modules,
    "user": "user_was_here" in vars(sys),
}))
"""


@pytest.fixture(scope="module")
def town(request):
    """An environment with the neighbours in it, kept in pytest's cache."""
    key = f"{base_python()} {sys.version} {PACKAGES}"
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = request.config.cache.mkdir("boot-neighbours") / name
    if not (folder / "whole").exists():
        house = House.with_pip(folder, base_python())
        done = house.pip("install", *PACKAGES, timeout=600)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            pytest.skip(f"{', '.join(PACKAGES)} cannot be installed here: {last}")
        (folder / "whole").touch()
    (site,) = folder.glob("lib/python3*/site-packages")
    return House(folder / "bin" / "python", site)


@pytest.fixture
def folders(town, checkout, tmp_path):
    return {
        "ours": checkout,
        "dd": town.site / "ddtrace" / "bootstrap",
        "otel": town.site / "opentelemetry" / "instrumentation" / "auto_instrumentation",
        "user": room(tmp_path / "user", "import sys; sys.user_was_here = True\n"),
    }


@pytest.fixture
def say(town, fake_vllm, folders, tmp_path):
    def run(*order, words=None, **environ):
        done = start(
            [*(words or [str(town.python)]), "-c", SAY],
            path=(*(folders[name] for name in order), fake_vllm),
            ASCEND_PATCHES="all",
            ASCEND_PATCHES_DEVICE="cpu",
            ASCEND_PATCHES_STATUS_DIR=str(tmp_path / "status"),
            PATH=f"{town.python.parent}{os.pathsep}{os.environ['PATH']}",
            **QUIET,
            **environ,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return ast.literal_eval(done.stdout.splitlines()[-1])

    return run


def assert_ours(said, doors=("sitecustomize",)):
    assert said["doors"] == list(doors)
    assert (said["armed"], said["begun"], said["problems"]) == (1, True, [])


@pytest.mark.parametrize("order", [("ours", "dd", "user"), ("dd", "ours", "user")], ids=",".join)
def test_ddtrace_in_both_orders(order, say):
    said = say(*order)
    assert_ours(said)
    assert said["dd"] is True
    assert said["user"]


def test_otel_behind_ours(say):
    said = say("ours", "otel")
    assert_ours(said)
    assert said["otel"]


@pytest.fixture
def with_pth(town, shim):
    """Our .pth, as an install would bring it, for one test."""
    door = town.site / "zz_test_door.pth"
    door.write_text(f"{shim}\n{(shim / 'ascend_patch.pth').read_text()}")
    yield
    door.unlink()


@pytest.mark.usefixtures("with_pth")
def test_otel_in_front_of_an_installed_shim(say):
    said = say("otel")
    assert_ours(said, ["pth"])
    assert said["otel"]


@pytest.mark.usefixtures("with_pth")
def test_otels_own_command_around_ours(say, town):
    said = say(words=["opentelemetry-instrument", str(town.python)])
    assert_ours(said, ["pth"])
    assert said["otel"]


def test_ddtraces_own_command_around_ours(say):
    said = say("ours", "user", words=["ddtrace-run", "python"])
    assert_ours(said)
    assert (said["dd"], said["user"]) == (True, True)


def test_our_command_inside_otels(say, town, checkout):
    """The cure for a drop-in that OpenTelemetry shadows."""
    launch = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ascend_patch import _run; "
        "_run.run(sys.argv[2:])"
    )
    inner = [str(town.python), "-c", launch, str(checkout), "--", str(town.python)]
    said = say(words=["opentelemetry-instrument", *inner])
    assert_ours(said)
    assert said["otel"]


@pytest.mark.parametrize("order", [("dd", "ours", "otel"), ("ours", "dd", "otel")], ids=",".join)
def test_three_of_them(order, say):
    said = say(*order)
    assert_ours(said)
    assert (said["dd"], said["otel"]) == (True, True)


@pytest.fixture
def coverage_data(tmp_path):
    (tmp_path / "coveragerc").write_text(f"[run]\ndata_file = {tmp_path / 'data'}\n")
    yield {"COVERAGE_PROCESS_START": str(tmp_path / "coveragerc")}
    assert list(tmp_path.glob("data*")), "coverage measured nothing"


def test_coverage_before_a_drop_in(say, coverage_data):
    said = say("ours", **coverage_data)
    assert_ours(said)
    assert said["coverage"]


@pytest.mark.usefixtures("with_pth")
def test_coverage_before_our_pth(say, coverage_data):
    said = say(**coverage_data)
    assert_ours(said, ["pth"])
    assert said["coverage"]


def test_coverage_after_our_pth(say, coverage_data, town, with_pth):
    # Files are read in the order of their names, and coverage's begins with `a1`.
    first = town.site / "a0_test_door.pth"
    (town.site / "zz_test_door.pth").rename(first)
    try:
        said = say(**coverage_data)
    finally:
        first.rename(town.site / "zz_test_door.pth")
    assert_ours(said, ["pth"])
    assert said["coverage"]
