"""A patch that breaks when it is applied: a replacement of it cannot even be built.

It stands in front of the shim's sitecustomize and hands over to it.
"""

import sys
import types


def forward(original):
    raise SystemExit("a fault of the test's own")


def anything(name):
    """Whatever the patch's other modules import from it is there."""
    if name.startswith("__"):
        raise AttributeError(name)
    return forward


broken = types.ModuleType("ascend_patch.impl.rotary")
broken.__getattr__ = anything
sys.modules[broken.__name__] = broken

here = __file__.rpartition("/")[0]
sys.path.remove(here)
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: E402, F401

sys.path.insert(0, here)
