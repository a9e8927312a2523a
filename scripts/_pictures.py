"""What each plot of scripts/bench begins with."""

from __future__ import annotations


def can_draw() -> bool:
    """Whether there is matplotlib, which then draws into files; a line where there is none."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot is written")
        return False
    matplotlib.use("Agg")
    return True
