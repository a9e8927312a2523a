"""What a target looks like in a source tree: its signature and a digest of its body.

A release is recognised by what it does, not by its name alone. Only `.py` files are read; nothing
is imported. The digest ignores what does not change behaviour (comments, layout, docstrings,
annotations) and is the same on every Python from 3.10 on.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

DIGEST_CHARACTERS = 16
MODULE = "<module>"
# Presentation, context that follows from the rest, or fields that only newer Pythons have.
IGNORED_FIELDS = frozenset(
    {"annotation", "ctx", "kind", "returns", "simple", "type_comment", "type_params"}
)
_DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_IMPORTS = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Fingerprint:
    """One symbol as a source file has it.

    Attributes:
        signature: Parameters with kinds and defaults, without annotations; empty for a class.
        digest: 16 hex digits of the SHA-256 of the normalised syntax tree, decorators included.
    """

    signature: str
    digest: str


def of_symbol(package_root: Path, module: str, qualname: str) -> Fingerprint | None:
    """The fingerprint of `module:qualname`, or None where the tree has no such symbol.

    Args:
        package_root: The folder that holds the top-level package.
        module: Dotted name, for example `vllm.model_executor.layers.rotary_embedding.base`.
        qualname: `Class.method`, `Class`, the name of a function or of an assignment, or
            `<module>`: what importing the module runs besides imports and definitions, such as
            the registrations of operators and the assignments into other modules.

    Raises:
        SyntaxError: The module's file is not Python of this interpreter's grammar.
    """
    path = module_file(package_root, module)
    if path is None:
        return None
    return of_source(read_source(path), qualname)


def of_source(source: str, qualname: str) -> Fingerprint | None:
    """The fingerprint of `qualname` in a module's source text, or None if it is not there."""
    nodes = _nodes(source, qualname)
    if not nodes and qualname != MODULE:
        return None
    text = "\n".join(_dump(node) for node in nodes)
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]
    last = nodes[-1] if nodes else None
    if isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef):
        return Fingerprint(_signature(last.args), digest)
    return Fingerprint("", digest)


def text_of(source: str, qualname: str) -> Iterator[str]:
    """The source lines of a symbol, every definition of it, for showing to people."""
    lines = source.splitlines()
    for node in _nodes(source, qualname):
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        yield from lines[first - 1 : node.end_lineno]


def module_file(package_root: Path, module: str) -> Path | None:
    """The file of a dotted module name below the folder of its top-level package."""
    stem = package_root.joinpath(*module.split("."))
    # In the order in which Python looks: a package hides a module of the same name.
    for path in (stem / "__init__.py", stem.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def read_source(path: Path) -> str:
    """A source file as text, by the encoding that it declares."""
    import tokenize

    with tokenize.open(path) as file:
        return file.read()


@lru_cache(maxsize=32)
def _parse(source: str) -> ast.Module:
    # An invalid escape in the host's source is not ours to report, nor (-W error) to fail on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _nodes(source: str, qualname: str) -> list[ast.stmt]:
    tree = _parse(source)
    if qualname == MODULE:
        body = _code(tree, tree.body)
        return [node for node in body if not isinstance(node, _DEFINITIONS | _IMPORTS)]
    return _find(tree, qualname.split("."))


def _find(scope: ast.AST, names: list[str]) -> list[ast.stmt]:
    """Every definition of the name in a scope: one under `if` and `else` each counts."""
    found = [node for node in _statements(scope) if names[0] in _names(node)]
    if len(names) == 1:
        return found
    classes = (node for node in found if isinstance(node, ast.ClassDef))
    return [deep for node in classes for deep in _find(node, names[1:])]


def _statements(scope: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, _DEFINITIONS):
            yield from _statements(node)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _signature(args: ast.arguments) -> str:
    """Parameters in order; a default as source text, so that a changed default is seen."""
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    parts = []
    for index, arg in enumerate(positional):
        default = f"={_default(args.defaults[index - required])}" if index >= required else ""
        parts.append(arg.arg + default)
        if index + 1 == len(args.posonlyargs):
            parts.append("/")
    if args.vararg:
        parts.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        parts.append("*")
    for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parts.append(arg.arg + (f"={_default(value)}" if value is not None else ""))
    if args.kwarg:
        parts.append(f"**{args.kwarg.arg}")
    return f"({', '.join(parts)})"


def _default(value: ast.expr) -> str:
    # Python 3.10 writes `lambda : x`, and later ones `lambda: x`.
    return ast.unparse(value).replace("lambda :", "lambda:")


def _dump(node: object, owner: object = None) -> str:
    """A syntax tree as text. `ast.dump` differs between Python versions; this does not."""
    if isinstance(node, list):
        return f"[{','.join(_dump(item, owner) for item in node)}]"
    if not isinstance(node, ast.AST):
        # repr() would follow the Unicode tables of the running Python.
        return ascii(node)
    # An annotation makes a field of a class, and nothing of a variable.
    if isinstance(node, ast.AnnAssign) and node.value and not isinstance(owner, ast.ClassDef):
        node = ast.Assign(targets=[node.target], value=node.value)
    fields = []
    for name, value in ast.iter_fields(node):
        if name in IGNORED_FIELDS or value is None or value == []:
            continue
        if name == "body" and isinstance(value, list):
            value = _code(node, value)
        if isinstance(node, ast.JoinedStr):
            value = _joined(node.values)
        fields.append(f"{name}={_dump(value, node)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _joined(values: list[ast.expr]) -> list[object]:
    """The parts of an f-string. Pythons differ in where they split its literal text."""
    parts: list[object] = []
    for value in values:
        text = value.value if isinstance(value, ast.Constant) else None
        if not isinstance(text, str):
            parts.append(value)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
    return parts


def _code(owner: ast.AST, body: list[ast.stmt]) -> list[ast.stmt]:
    """A body without its docstring, and without the `pass` that may stand in for one."""
    if isinstance(owner, _DEFINITIONS | ast.Module) and body and isinstance(body[0], ast.Expr):
        first = body[0].value
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            body = body[1:]
    return [node for node in body if not isinstance(node, ast.Pass)]
