"""Lets these tests import their environment, and what scripts share, by plain names."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts")]
# What compiles for Ascend.
sys.path.append(str(HERE.parent / "kernels"))
