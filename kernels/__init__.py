"""Kernels of Ascend Patch, installed and imported as ``ascend_patch.kernels``.

The top-level name ``kernels`` belongs to another distribution (Hugging Face's). A checkout that is
the working directory or on PYTHONPATH would answer to it by accident, so under that name this file
steps aside for the package that the user meant.
"""

from __future__ import annotations


def _hand_over() -> None:
    """Replace ourselves in ``sys.modules`` by the ``kernels`` that comes after us on ``sys.path``.

    Raises ModuleNotFoundError, as an absent package does, if there is none.
    """
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.realpath(__file__)
    root = os.path.dirname(os.path.dirname(here))
    entries = list(sys.path)
    roots = [os.path.realpath(entry or os.getcwd()) for entry in entries]
    # Looking only further down the path ends even where two checkouts would hand over to each
    # other. Entries above us were asked by the import system before we were.
    start = roots.index(root) + 1 if root in roots else 0

    for entry, entry_root in zip(entries[start:], roots[start:], strict=True):
        if entry_root == root:
            continue
        spec = PathFinder.find_spec("kernels", [entry])
        # A folder without __init__.py (a namespace portion) is not the package anyone asked for;
        # our own file can come back through a symlink.
        if spec is None or spec.loader is None or not spec.origin:
            continue
        if os.path.realpath(spec.origin) == here:
            continue
        module = module_from_spec(spec)
        # As the import system does it: another thread that imports the name now waits for us
        # instead of taking a half-executed module.
        spec._initializing = True  # type: ignore[attr-defined]
        sys.modules["kernels"] = module
        try:
            spec.loader.exec_module(module)
        finally:
            spec._initializing = False  # type: ignore[attr-defined]
        return
    raise ModuleNotFoundError("No module named 'kernels'", name="kernels")


if __name__ == "kernels":
    _hand_over()
