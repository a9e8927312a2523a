"""A release's source as syntax trees: what the derivations ask of it.

It shares nothing with `ascend_patch._fingerprint`, so that a fault there is not repeated here.
"""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@lru_cache(maxsize=256)
def parsed(path: Path) -> ast.Module:
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(file.read())


class Tree:
    """The package of one release.

    Args:
        root: The folder that holds it.
        package: `vllm` or `vllm_ascend`.
    """

    def __init__(self, root: Path, package: str) -> None:
        self.root, self.package = root, package

    def file(self, module: str) -> Path | None:
        stem = self.root.joinpath(*module.split("."))
        choices = (stem / "__init__.py", stem.parent / f"{stem.name}.py")
        return next((path for path in choices if path.is_file()), None)

    def module(self, name: str) -> ast.Module | None:
        path = self.file(name)
        return parsed(path) if path else None

    def node(self, place: str) -> Definition | None:
        """The last definition of `module:qualname`, as importing the module leaves it."""
        module, _, qualname = place.partition(":")
        scope: ast.Module | Definition | None = self.module(module)
        for name in qualname.split("."):
            if scope is None:
                return None
            named = [node for node in definitions(scope) if node.name == name]
            scope = named[-1] if named else None
        assert not isinstance(scope, ast.Module)
        return scope

    def has(self, place: str) -> bool:
        return self.node(place) is not None

    def parameters(self, place: str) -> list[str]:
        """The names of a function's parameters, in order."""
        node = self.node(place)
        assert isinstance(node, FUNCTIONS), place
        return [argument.arg for argument in every_argument(node.args)]

    def words(self, place: str) -> set[str]:
        """Every name, attribute and keyword in a definition."""
        node = self.node(place)
        return set() if node is None else words(node)

    def files(self, under: str = "") -> Iterator[tuple[str, Path]]:
        """Every module of the package, or of one inside it."""
        folder = self.root.joinpath(*(under or self.package).split("."))
        for path in sorted(folder.rglob("*.py")):
            parts = list(path.relative_to(self.root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            yield ".".join(parts), path

    def mentioning(self, names: set[str], under: str = "") -> Iterator[tuple[str, ast.Module]]:
        """The modules whose text holds one of these identifiers, parsed."""
        pattern = re.compile(rb"\b(?:" + "|".join(sorted(names)).encode() + rb")\b")
        for module, path in self.files(under):
            if pattern.search(path.read_bytes()):
                yield module, parsed(path)


def definitions(scope: ast.AST) -> Iterator[Definition]:
    """The functions and classes of a scope, those under `if` and `try` too."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from definitions(node)


def every_argument(arguments: ast.arguments) -> list[ast.arg]:
    found = [*arguments.posonlyargs, *arguments.args]
    found += [arguments.vararg] if arguments.vararg else []
    found += arguments.kwonlyargs
    return found + ([arguments.kwarg] if arguments.kwarg else [])


def words(node: ast.AST) -> set[str]:
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            found.add(inner.attr)
        elif isinstance(inner, ast.keyword) and inner.arg:
            found.add(inner.arg)
    return found


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a function or method of this name."""
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and (getattr(call.func, "id", None) == name or getattr(call.func, "attr", None) == name)
    ]


def imports(module: str, tree: ast.AST, *, package: bool = False) -> dict[str, str]:
    """What the names that a module imports stand for: `module` or `module:name`.

    Args:
        module: The dotted name of the module.
        package: Whether it is a package's `__init__`, from which `.` is counted.
    """
    return imports_among(ast.walk(tree), module, package=package)


def imports_among(nodes: Iterable[ast.AST], module: str, *, package: bool) -> dict[str, str]:
    """The same from a module's nodes, for a caller that has them."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            origin = source_of(node, module, package)
            for alias in node.names:
                found[alias.asname or alias.name] = f"{origin}:{alias.name}"
    return found


def source_of(node: ast.ImportFrom, module: str, package: bool = False) -> str:
    """The absolute name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + int(package)]
    return ".".join([*parts, *(node.module.split(".") if node.module else [])])


def dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as its parts; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    return [node.id, *reversed(parts)]


def plain(node: ast.AST) -> str:
    """A definition without docstrings and annotations, as text to compare."""
    copy = ast.parse(ast.unparse(node))
    for inner in ast.walk(copy):
        if isinstance(inner, FUNCTIONS):
            inner.returns = None
        if isinstance(inner, ast.arg):
            inner.annotation = None
        body = getattr(inner, "body", None)
        if isinstance(inner, Definition) and isinstance(body, list) and len(body) > 1:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                del body[0]
    return ast.dump(copy)
