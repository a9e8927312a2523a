"""What importing a release's modules does to the places that patches change, by syntax trees.

Who imports a function by name, who keeps it in something else, who assigns to it, who compares it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from release_tree import FUNCTIONS, Tree, dotted, imports, imports_among

# A node, the function whose call runs it, and the class whose body it is in.
Node = tuple[ast.AST, str, str]


@dataclass(frozen=True, order=True)
class Found:
    """One use of a place.

    Attributes:
        kind: `imported` (another module has it by name), `kept` (something else holds it from
            import on), `assigned`, `compared`.
        place: `module:qualname` of what is used.
        module: Where.
        inside: The function that it happens in; empty where importing the module does it.
        text: The statement or expression, as source.
    """

    kind: str
    place: str
    module: str
    inside: str
    text: str


def uses(trees: dict[str, Tree], places: frozenset[str]) -> list[Found]:
    """Every use of these places in the packages of a release."""
    found: set[Found] = set()
    # A function, or the class that has the method: whoever uses one has to name it.
    named = {place.rpartition(":")[2].partition(".")[0] for place in places}
    if not named:
        return []
    for tree in trees.values():
        for module, source in tree.mentioning(named):
            file = tree.file(module)
            package = file is not None and file.name == "__init__.py"
            # Once for all that is asked of them: a release has a million.
            nodes = list(_walk(source))
            names = Names(module, [node for node, _, _ in nodes], trees, places, package)
            found.update(_of_module(module, source, nodes, names, places))
    return sorted(found)


class Names:
    """What a dotted expression of a module stands for, as `module:qualname`."""

    def __init__(
        self,
        module: str,
        nodes: list[ast.AST],
        trees: dict[str, Tree],
        places: frozenset[str],
        package: bool,
    ) -> None:
        self.module, self.trees = module, trees
        self.last = {place.rpartition(":")[2].rpartition(".")[2] for place in places}
        self.imported = imports_among(nodes, module, package=package)
        self.own = {node.name for node in nodes if isinstance(node, (*FUNCTIONS, ast.ClassDef))}

    def place(self, parts: list[str]) -> str:
        """Empty where the expression begins with something local, or ends in another name."""
        if not parts:
            return ""
        origin = self.imported.get(parts[0])
        end = parts[-1] if len(parts) > 1 or origin is None else origin.rpartition(":")[2]
        if end not in self.last:
            return ""
        if origin is None:
            return f"{self.module}:{'.'.join(parts)}" if parts[0] in self.own else ""
        return self._settle(origin, parts[1:])

    def _settle(self, origin: str, rest: list[str]) -> str:
        """Follow packages and re-exports to where a name is defined."""
        module, _, name = origin.partition(":")
        path = [*([name] if name else []), *rest]
        while path and self._is_module(f"{module}.{path[0]}"):
            module, path = f"{module}.{path[0]}", path[1:]
        if not path:
            return ""
        again = self._exported(module).get(path[0])
        if again and again != f"{module}:{path[0]}":
            return self._settle(again, path[1:])
        return f"{module}:{'.'.join(path)}"

    def _is_module(self, name: str) -> bool:
        return any(tree.file(name) is not None for tree in self.trees.values())

    def _exported(self, module: str) -> dict[str, str]:
        for tree in self.trees.values():
            file = tree.file(module)
            if file is not None:
                return _imports_of(tree, module, file.name == "__init__.py")
        return {}


@cache
def _imports_of(tree: Tree, module: str, package: bool) -> dict[str, str]:
    source = tree.module(module)
    return imports(module, source, package=package) if source else {}


def _of_module(
    module: str, source: ast.Module, nodes: list[Node], names: Names, places: frozenset[str]
) -> Iterator[Found]:
    for node, inside, owner in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                place = names.place([alias.asname or alias.name])
                if place in places:
                    # Rebinding by identity reaches what a module has by name, and no class.
                    kind = "kept" if owner else "imported"
                    yield Found(kind, place, module, inside, ast.unparse(node).splitlines()[0])
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                parts = dotted(target)
                place = names.place(parts) if len(parts) > 1 else ""
                if place in places:
                    yield Found("assigned", place, module, inside, ast.unparse(node))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            holder, name = node.args[:2]
            if isinstance(name, ast.Constant):
                place = names.place([*dotted(holder), str(name.value)])
                if place in places:
                    yield Found("assigned", place, module, inside, ast.unparse(node))
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                place = names.place(dotted(side))
                if place in places:
                    yield Found("compared", place, module, inside, ast.unparse(node))
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            parts = dotted(node)
            # In the body of a class its methods have their bare names.
            place = f"{module}:{owner}.{parts[0]}" if owner and len(parts) == 1 else ""
            if place not in places:
                place = names.place(parts)
            if place in places and not inside:
                yield Found("kept", place, module, inside, _line(source, node))


def _walk(source: ast.Module) -> Iterator[Node]:
    stack: list[Node] = [(source, "", "")]
    while stack:
        node, inside, owner = stack.pop()
        for field, value in ast.iter_fields(node):
            if field in ("returns", "annotation"):
                continue  # annotations are not what runs
            for child in value if isinstance(value, list) else (value,):
                if not isinstance(child, ast.AST) or isinstance(child, ast.arg):
                    continue
                within, held = inside, owner
                if field == "body":
                    if isinstance(node, FUNCTIONS):
                        within, held = (f"{inside}.{node.name}" if inside else node.name), ""
                    elif isinstance(node, ast.Lambda):
                        within = inside or "<lambda>"
                    elif isinstance(node, ast.ClassDef):
                        held = f"{owner}.{node.name}" if owner else node.name
                found = (child, within, held)
                yield found
                stack.append(found)


def _line(source: ast.Module, node: ast.AST) -> str:
    """The statement at the top of a module or class that an expression is in."""
    line = node.lineno  # type: ignore[attr-defined]
    spans = [
        (min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))]), s.end_lineno, s)
        for s in ast.walk(source)
        if isinstance(s, ast.stmt)
    ]
    holding = [(end - first, s) for first, end, s in spans if first <= line <= (end or first)]
    return ast.unparse(min(holding, key=lambda one: one[0])[1]).splitlines()[0]
