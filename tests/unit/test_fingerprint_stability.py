"""Fingerprints stay: equal on every Python, blind to comments, docstrings, layout, annotations."""

from __future__ import annotations

import ast
import warnings

import pytest
from fingerprint_samples import PLAIN, SAMPLE, fingerprint
from hypothesis import given
from hypothesis import strategies as st

from ascend_patch._fingerprint import Fingerprint

# --- the same on every Python ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("qualname", "signature", "digest"),
    [
        ("LIMIT", "", "c028f5042bf37d42"),
        ("TABLE", "", "8dffad7656adae38"),
        ("Layer", "", "4f9bd0c3b5b976c1"),
        ("Layer.Inner", "", "0937d8ff3ec9373a"),
        ("Layer.Inner.twice", "(x, /)", "5008b937c5a25121"),
        ("Layer.scale", "", "18ed4da27189e520"),
        (
            "Layer.forward",
            "(self, positions, query, key=None, *rest, scale=1.0, **options)",
            "c9f42008b315d33e",
        ),
        ("Layer.stream", "(self, items)", "96ef205c70eb9e50"),
        ("Layer.route", "(self, command)", "67b6998ca70a6c4a"),
        ("plain", "(a, b=(1, 2), *, c=lambda: {}, d=~0)", "c2883c8f6ab132e4"),
        ("<module>", "", "8da2249fb90a2139"),
    ],
)
def test_the_digest_is_the_one_that_was_recorded(
    qualname: str, signature: str, digest: str
) -> None:
    # Literals: whichever Python runs this, from 3.10 on, has to come to the same.
    assert fingerprint(SAMPLE, qualname) == Fingerprint(signature, digest)


# --- presentation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        """
        def f(self, x, y=1):
            # a comment
            total = x + y  # another

            return [total, 'a']
        """,
        """
        def f(self, x, y=1):
            '''A docstring.'''
            total = x + y
            return [total, 'a']
        """,
        """
        def f(self, x: torch.Tensor, y: int | None = 1) -> list[object]:
            total: torch.Tensor = x + y
            return [total, 'a']
        """,
        """
        def f(
            self, x,
            y=(1),
        ):
            total = (
                x +
                y
            ); return [total, "a",]
        """,
        """
        if True:
            def f(self, x, y=1):
                pass
                total = x + y
                return [total, u'a']
        """,
    ],
)
def test_presentation_does_not_move_a_fingerprint(source: str) -> None:
    assert fingerprint(source) == fingerprint(PLAIN)


def test_a_docstring_in_place_of_pass_changes_nothing() -> None:
    assert fingerprint("def f():\n    pass") == fingerprint('def f():\n    """Later."""')


def test_docstrings_of_inner_definitions_are_ignored() -> None:
    source = "class C:\n    {}\n    def f(self):\n        {}\n        return 1"
    assert fingerprint(source.format('"a"', '"b"'), "C") == fingerprint(
        source.format("pass", "pass"), "C"
    )


@given(
    comment=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])),
    docstring=st.text(),
    indent=st.integers(1, 8),
)
def test_any_comment_docstring_and_indent_is_ignored(
    comment: str, docstring: str, indent: int
) -> None:
    space = " " * indent
    source = (
        f"def f(self, x, y=1):\n{space}{docstring!r}\n{space}total = x + y  # {comment}\n"
        f"{space}return [total, 'a']"
    )
    assert fingerprint(source) == fingerprint(PLAIN)


@given(st.sampled_from(["Layer", "Layer.forward", "Layer.stream", "Layer.route", "plain"]))
def test_unparsing_and_parsing_again_changes_nothing(qualname: str) -> None:
    again = ast.unparse(ast.parse(SAMPLE))
    assert fingerprint(again, qualname) == fingerprint(SAMPLE, qualname)


def test_a_warning_in_the_source_is_kept_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fingerprint(r"def f(): return '\e'")
