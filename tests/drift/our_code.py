"""Our own replacements, by syntax trees: their parameters, and what they import of a host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from release_tree import FUNCTIONS, Tree, imports, parsed, source_of

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = "ascend_patch.impl"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions(module: str) -> dict[str, Function | ast.ClassDef]:
    tree = parsed(CHECKOUT.joinpath(*module.split(".")).with_suffix(".py"))
    return {node.name: node for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}


@cache
def imported_by(module: str) -> dict[str, str]:
    return imports(module, parsed(CHECKOUT.joinpath(*module.split(".")).with_suffix(".py")))


def made_by(replacement: str) -> list[Function]:
    """The functions that a factory may return; a factory that calls another one is followed."""
    module, _, name = replacement.partition(":")
    imported = imported_by(module)
    own = functions(module)
    factory = own.get(name)
    if factory is None:
        return made_by(imported[name]) if name in imported else []
    inner = {node.name: node for node in factory.body if isinstance(node, FUNCTIONS)}
    found: list[Function] = []
    for node in ast.walk(factory):
        if not isinstance(node, ast.Return) or node.value is None:
            continue
        value = node.value
        if isinstance(value, ast.Name) and value.id in inner:
            found.append(inner[value.id])
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            called = value.func.id
            if called in own and called != name:
                found += made_by(f"{module}:{called}")
            elif called in imported and imported[called].startswith(OURS):
                found += made_by(imported[called])
    return found


def host_imports(replacement: str, packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(module, name) of what a replacement, and what it calls of ours, imports of a host.

    Those under `except ImportError` are asked for and not relied on.
    """
    module, _, name = replacement.partition(":")
    seen: set[tuple[str, str]] = set()
    waiting = [(module, name)]
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or not module.startswith(OURS):
            continue
        seen.add((module, name))
        file = CHECKOUT.joinpath(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            continue
        node = functions(module).get(name)
        imported = imported_by(module)
        if node is None:
            if name in imported:
                waiting.append(tuple(imported[name].split(":")))  # type: ignore[arg-type]
            continue
        optional = {
            id(inner)
            for attempt in ast.walk(node)
            if isinstance(attempt, ast.Try)
            and any("Error" in ast.unparse(h.type) for h in attempt.handlers if h.type)
            for statement in attempt.body
            for inner in ast.walk(statement)
        }
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and id(inner) not in optional:
                origin = source_of(inner, module)
                if origin.partition(".")[0] in packages:
                    yield from ((origin, alias.name) for alias in inner.names)
            if isinstance(inner, ast.Name) and inner.id in functions(module):
                waiting.append((module, inner.id))
            if isinstance(inner, ast.Name) and ":" in imported.get(inner.id, ""):
                waiting.append(tuple(imported[inner.id].split(":")))  # type: ignore[arg-type]


def provides(tree: Tree, module: str, name: str) -> bool:
    """Whether `from module import name` finds something: a submodule, or a name of the module."""
    if tree.file(f"{module}.{name}"):
        return True
    source = tree.module(module)
    if source is None:
        return False
    for node in ast.walk(source):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.Import | ast.ImportFrom) and any(
            name == (alias.asname or alias.name) for alias in node.names
        ):
            return True
        if isinstance(node, ast.Constant) and node.value == name:
            return True  # a lazy module names what it hands out
    return False
