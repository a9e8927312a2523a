"""Lets these tests import what makes the software NPU, and what scripts share, by plain names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts"), str(HERE.parent / "e2e")]

from _system import SetupError  # noqa: E402
from softnpu_environment import Environment  # noqa: E402


@pytest.fixture(scope="session")
def npu() -> Environment:
    """The software NPU with vllm-ascend 0.18.0: packages in seconds, compiled in half a minute."""
    try:
        return Environment("0.18.0").prepare()
    except SetupError as error:
        pytest.skip(f"missing: {error}")
