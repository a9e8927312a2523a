"""torchvision, by name only: what the models of images import, and text never calls.

Import it before vLLM's models. The library is built for one torch and is not among those of these
environments.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "torchvision"


class _Member(type):
    """A class whose attributes are their own names: enumerations are keys of tables."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Names(ModuleType):
    """Any name that it is asked for is a class of its own."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Member(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        own = name == PACKAGE or name.startswith(f"{PACKAGE}.")
        return ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec):
        module = _Names(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
