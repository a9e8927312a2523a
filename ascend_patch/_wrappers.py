"""What stands in a host target's place: a wrapt wrapper that copies and pickles as what it wraps.

A function is copied as itself and pickled by its name, a bound method by its object and its name;
wrapt refuses both. So objects that hold a target, or a method bound from one, are copied and sent
to other processes as they are without the shim; a process without it gets the original.
"""

from __future__ import annotations

import copy
from typing import Any

import wrapt

# Typed loosely: releases of wrapt annotate these classes in different ways, or not.
_FunctionWrapper: Any = wrapt.FunctionWrapper
_BoundFunctionWrapper: Any = wrapt.BoundFunctionWrapper
_bind: Any = wrapt.FunctionWrapper.__get__


class BoundMethodWrapper(_BoundFunctionWrapper):  # type: ignore[misc]
    """What a target gives when it is looked up on a class or an instance."""

    __slots__ = ()

    def _is_method(self) -> bool:
        """Whether it is bound to an instance or a class; else it is a function, as in Python."""
        return getattr(self.__wrapped__, "__self__", None) is not None

    def _bound_to(self, owner: Any) -> Any:
        if isinstance(owner, type):
            return self._self_parent.__get__(None, owner)
        return self._self_parent.__get__(owner, type(owner))

    def __copy__(self) -> Any:
        return self._bound_to(self.__wrapped__.__self__) if self._is_method() else self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not self._is_method():
            return self
        return self._bound_to(copy.deepcopy(self.__wrapped__.__self__, memo))

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._is_method():
            return getattr, (self.__wrapped__.__self__, self.__wrapped__.__name__)
        return self.__wrapped__.__qualname__


class TargetWrapper(_FunctionWrapper):  # type: ignore[misc]
    """A target's wrapper, as `wrapt.FunctionWrapper`.

    A function that is looked up on its class is one object, as without the shim: pickling by
    reference rests on that.
    """

    __bound_function_wrapper__ = BoundMethodWrapper

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._self_functions: dict[Any, Any] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is not None:
            return _bind(self, instance, owner)
        return self._of_class(owner)

    def _of_class(self, owner: Any) -> Any:
        if self._self_binding == "classmethod":
            return _bind(self, None, owner)
        # That of the class which has it: one that inherits it would take no other's instances.
        home = next((c for c in owner.__mro__ if any(v is self for v in vars(c).values())), owner)
        if home not in self._self_functions:
            self._self_functions[home] = _bind(self, None, home)
        return self._self_functions[home]

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = getattr(self.__wrapped__, "__qualname__", None)
        # What has no name is pickled as it is without the shim.
        return self.__wrapped__.__reduce_ex__(protocol) if name is None else name


class StaticTargetWrapper(TargetWrapper):
    """The same of a static method: a function, wherever it is looked up."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._of_class(type(instance) if owner is None else owner)


def wrapper_of(original: Any, wrapper: Any, enabled: Any) -> TargetWrapper:
    """A wrapper around what is found at a target, read without the descriptor protocol.

    Args:
        original: A function, a method's descriptor, or another callable.
        wrapper: Called with (wrapped, instance, args, kwargs), as wrapt has it.
        enabled: Asked in each call; where it says no, the original is called.
    """
    kind = StaticTargetWrapper if type(original) is staticmethod else TargetWrapper
    return kind(original, wrapper, enabled=enabled)
