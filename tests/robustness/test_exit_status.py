"""What the shim says on stderr never changes how the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest

DEMO = 'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"))'
IMPORTS_VLLM = "import vllm.ops"
# The control: what a library does that writes to stderr and takes care of the error alone.
WRITES = "import sys\ntry:\n    sys.stderr.write('x\\n')\nexcept OSError:\n    pass\n"


@contextmanager
def full() -> Iterator[IO[Any]]:
    with open("/dev/full", "w") as file:
        yield file


@contextmanager
def broken() -> Iterator[IO[Any]]:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        yield file


def exit_status(host: Any, code: str, stderr: IO[Any], **more: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=host.environment(**more),
        cwd=host.folder,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        timeout=60,
    ).returncode


@pytest.mark.fault("full_stderr_changes_exit_status")
@pytest.mark.parametrize("stderr", [full, broken])
@pytest.mark.parametrize("says", ["what was decided", "a complaint"])
def test_a_stderr_that_takes_nothing_leaves_the_exit_status_alone(host, stderr, says):
    host.patches(DEMO)
    more = {} if says == "what was decided" else {"ASCEND_PATCHES_STATUS_DIR": "/proc/nowhere"}
    with stderr() as file:
        assert exit_status(host, WRITES, file, FAKE_DOOR="") == 120
        assert exit_status(host, IMPORTS_VLLM, file, **more) == 0


def test_what_is_said_comes_after_what_the_host_has_said(host):
    code = (
        "import sys, io\nfrom ascend_patch._bootstrap import complain\n"
        "sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, 'w')), encoding='ascii')\n"
        "sys.stderr.write('first, ')\ncomplain('second \\u542f')\nsys.stderr.write('third')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=host.environment(FAKE_DOOR=""), capture_output=True
    )
    assert done.stderr == b"first, ascend-patch: second \\u542f\nthird"
