"""Fingerprints: awake to every change of code, of every symbol that a file defines."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from fingerprint_samples import PLAIN, fingerprint

from ascend_patch import _fingerprint

# --- code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "def f(self, x, y=1):\n    total = x - y\n    return [total, 'a']",
        "def f(self, x, y=1):\n    total = x + y\n    return [total, 'b']",
        "def f(self, x, y=1):\n    total = x + y\n    return (total, 'a')",
        "def f(self, x, y=1):\n    total = x + y\n    return [total, b'a']",
        "def f(self, x, y=1):\n    total = y + x\n    return [total, 'a']",
        "def f(self, x, y=1):\n    total = x + y\n    yield [total, 'a']",
        "async def f(self, x, y=1):\n    total = x + y\n    return [total, 'a']",
        "@cache\ndef f(self, x, y=1):\n    total = x + y\n    return [total, 'a']",
        "def f(self, x, y=1):\n    'a'\n    'b'\n    total = x + y\n    return [total, 'a']",
    ],
)
def test_code_moves_the_digest_and_not_the_signature(source: str) -> None:
    moved = fingerprint(source)
    assert moved.digest != fingerprint(PLAIN).digest
    assert moved.signature == fingerprint(PLAIN).signature


@pytest.mark.parametrize(
    ("parameters", "signature"),
    [
        ("self, x, y=2", "(self, x, y=2)"),
        ("self, x, y=1.0", "(self, x, y=1.0)"),
        ("self, x, y", "(self, x, y)"),
        ("self, x, /, y=1", "(self, x, /, y=1)"),
        ("self, x, *, y=1", "(self, x, *, y=1)"),
        ("self, x, y=1, **z", "(self, x, y=1, **z)"),
        ("self, z, y=1", "(self, z, y=1)"),
    ],
)
def test_parameters_move_signature_and_digest(parameters: str, signature: str) -> None:
    moved = fingerprint(
        f"def f({parameters}):\n    total = x + y\n    return [total, 'a']",
    )
    assert moved.signature == signature
    assert moved.digest != fingerprint(PLAIN).digest


def test_the_annotation_that_makes_a_field_of_a_dataclass_counts() -> None:
    assert fingerprint("class f:\n    x: int = 1") == fingerprint("class f:\n    x: float = 1")
    assert fingerprint("class f:\n    x: int = 1") != fingerprint("class f:\n    x = 1")


MUTABLE = """
@decorate(size=4)
def f(self, x, /, y=1, *rest, z=None, **options):
    total = -x + y * 2
    if total > 3 and x is not y:
        total += f"{x:>{y}} of {options}"[1:].strip(rest)
    return [row for row in self.rows if row not in total] or (lambda q=5: q)
"""


def change(node: ast.AST) -> bool:
    """Give a node another meaning; False where there is none for its type."""
    if isinstance(node, ast.Constant):
        node.value = "changed"
    elif isinstance(node, ast.Name):
        node.id += "_"
    elif isinstance(node, ast.Attribute):
        node.attr += "_"
    elif isinstance(node, ast.arg | ast.keyword):
        node.arg = f"{node.arg}_"
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = ast.FloorDiv()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.Invert()
    elif isinstance(node, ast.Compare):
        node.ops = [ast.Is()]
    elif isinstance(node, ast.comprehension):
        node.ifs = []
    elif isinstance(node, ast.FunctionDef):
        node.decorator_list = []
    elif isinstance(node, ast.Return):
        node.value = None
    else:
        return False
    return True


def mutants() -> Iterator[str]:
    """MUTABLE, with each of its nodes changed in turn."""
    for index in range(len(list(ast.walk(ast.parse(MUTABLE))))):
        tree = ast.parse(MUTABLE)
        if change(list(ast.walk(tree))[index]):
            yield ast.unparse(tree)


def test_every_single_change_of_code_moves_the_digest() -> None:
    digests = [fingerprint(source).digest for source in mutants()]
    assert len(digests) > 40
    assert fingerprint(MUTABLE).digest not in digests
    assert len(set(digests)) == len(digests)


# --- finding a symbol ------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["if A:", "try:", "with A:", "for a in A:", "while A:"])
def test_a_definition_inside_a_statement_is_found(header: str) -> None:
    tail = "\nexcept E:\n    pass" if header == "try:" else ""
    source = f"{header}\n    def f():\n        return 1{tail}"
    assert fingerprint(source) == fingerprint("def f():\n    return 1")


@pytest.mark.parametrize(
    "template",
    [
        "if A:\n    def f(x): return 1\nelse:\n    def f(x, y): return {}",
        "try:\n    def f(x): return 1\nexcept E:\n    def f(x, y): return {}",
        "def f(x): return 1\ndef f(x, y): return {}",
    ],
)
def test_every_definition_of_a_name_counts(template: str) -> None:
    two, three = fingerprint(template.format(2)), fingerprint(template.format(3))
    assert two.digest != three.digest
    assert two.signature == three.signature == "(x, y)"


def test_both_halves_of_a_conditional_class_are_searched() -> None:
    source = "if A:\n    class C:\n        def f(self): return 1\nelse:\n    class C:\n        {}"
    one = fingerprint(source.format("pass"), "C.f")
    two = fingerprint(source.format("def f(self): return 2"), "C.f")
    assert one.digest != two.digest


def test_getter_and_setter_both_count() -> None:
    source = "class C:\n    @property\n    def f(self): return 1\n{}"
    setter = "    @f.setter\n    def f(self, value): pass"
    assert fingerprint(source.format(""), "C.f") != fingerprint(source.format(setter), "C.f")


@pytest.mark.parametrize(
    "qualname", ["g", "C.g", "C.f.g", "f.g", "D", "D.f", "g.C", "total", "imported"]
)
def test_what_is_not_defined_there_is_none(qualname: str) -> None:
    source = """
    from elsewhere import imported
    class C:
        def f(self):
            def g(): total = 1
    def f():
        class D: pass
    """
    assert _fingerprint.of_source(textwrap.dedent(source), qualname) is None


def test_an_assignment_is_a_symbol_with_or_without_annotation() -> None:
    assert fingerprint("f: dict[str, int] = {}") == fingerprint("f = {}")
    assert fingerprint("f = {}") != fingerprint("f = {1: 2}")


def test_the_module_symbol_is_what_an_import_runs() -> None:
    module = "'A module.'\nimport a\ndef g(): {}\nclass C: {}\ntarget.method = {}"
    first = fingerprint(module.format("pass", "pass", "g"), "<module>")
    assert first == fingerprint(module.format("return 1", "x = 1", "g"), "<module>")
    assert first != fingerprint(module.format("pass", "pass", "h"), "<module>")
    assert fingerprint("import a", "<module>").signature == ""


# --- files -----------------------------------------------------------------------------------


def test_a_module_is_read_from_its_file_or_its_package(tmp_path: Path) -> None:
    package = tmp_path / "host" / "layers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def f(): return 1")
    (package / "rope.py").write_bytes(b"# coding: latin-1\ndef f(): return '\xe9'")
    # Python prefers a package to a module of its name.
    (tmp_path / "host" / "layers.py").write_text("def f(): return 2")
    of = _fingerprint.of_symbol
    assert of(tmp_path, "host.layers", "f") == fingerprint("def f(): return 1")
    assert of(tmp_path, "host.layers.rope", "f") == fingerprint("def f(): return 'é'")
    assert of(tmp_path, "host.layers.norm", "f") is None
    assert of(tmp_path, "host.layers.rope", "g") is None


def test_text_of_shows_decorators_and_every_definition() -> None:
    source = "@a\n@b\ndef f():\n    return 1\nx = 1\ndef f(): return 2\n"
    assert list(_fingerprint.text_of(source, "f")) == [
        "@a",
        "@b",
        "def f():",
        "    return 1",
        "def f(): return 2",
    ]
