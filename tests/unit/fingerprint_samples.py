"""What the tests of fingerprints share: two sources, and the fingerprint of a symbol in one."""

from __future__ import annotations

import textwrap

from ascend_patch import _fingerprint
from ascend_patch._fingerprint import Fingerprint

SAMPLE = '''
"""A module."""
import functools

LIMIT: int = 4
TABLE = {"a": [1, 2.5, -3j], **{"b": b"\\x00"}}


class Layer(Base, metaclass=Meta):
    """A class."""

    scale: float = 1.0
    size: int

    class Inner:
        @staticmethod
        def twice(x, /):
            return x * 2

    @functools.lru_cache(maxsize=None)
    def forward(self, positions, query, key=None, *rest, scale=1.0, **options):
        """A method."""
        total: int = 0  # a comment
        if (n := len(rest)) > LIMIT and key is not None:
            total = n - 1
        rotated = [row[::2, ...] for row in query if row]
        label = f"{n!r:>{total}} of {options['a']}" f" and {{so}} {total=} é\\N{BULLET}" "!"
        try:
            return rotated, (*rest, label), lambda y=1, *, z: y + z
        except (KeyError, ValueError) as error:
            raise RuntimeError("no") from error
        finally:
            del total

    async def stream(self, items):
        async with self.lock as lock, self.other:
            async for item in items:
                yield await lock.take(item)

    def route(self, command):
        match command:
            case {"op": "rope", "dim": int(dim), **rest} if dim > 0:
                return dim, rest
            case [1 | 2, *others] | (None as others):
                return others
            case Point(x=0, y=-1.5) | True:
                return None
            case _:
                assert command, f"what: {command}"
        global LIMIT
        while True:
            LIMIT += 1 if command else 2
            break
        else:
            pass


def plain(a, b=(1, 2), *, c=lambda: {}, d: "int" = ~0):
    return a if b else c


register("sample", plain)
'''

PLAIN = """
    def f(self, x, y=1):
        total = x + y
        return [total, 'a']
"""


def fingerprint(source: str, qualname: str = "f") -> Fingerprint:
    found = _fingerprint.of_source(textwrap.dedent(source), qualname)
    assert found is not None, f"{qualname} is not in the source"
    return found
