"""What vLLM's compile cache takes for its key, from a release's source: envs, backends, caching.

A CPU server never loads from that cache, so no server here shows it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from release_tree import FUNCTIONS, Tree, calls, words

COMPILATION = "vllm.compilation"
# What an environment is hashed by: a dictionary of all variables, or before that a list.
HASHES = ("compile_factors", "compute_hash")
# What is compiled ahead of time had a folder beside the other up to 0.16.
FOLDERS = {"torch_compile_cache", "torch_aot_compile"}
# Functions of caching.py that begin with the environment's hash.
OF_CONFIG = ("aot_compile_hash_factors", "compilation_config_hash_factors")


@dataclass(frozen=True)
class Key:
    """How one release names a folder of compiled graphs.

    Attributes:
        hashed_by: The function of vllm.envs.
        folders: (module, function) of each place that names such a folder.
        traced: Those whose name depends on the source files that were traced.
        unkeyed: Those whose name does not depend on the environment.
        by_name: Modules that import the function by name, so that a wrapper is not seen.
    """

    hashed_by: str
    folders: tuple[tuple[str, str], ...]
    traced: tuple[tuple[str, str], ...]
    unkeyed: tuple[tuple[str, str], ...]
    by_name: tuple[str, ...]


def key_of(tree: Tree) -> Key:
    hashed_by = next(name for name in HASHES if tree.has(f"vllm.envs:{name}"))
    keyed = {
        name
        for name in OF_CONFIG
        for node in [tree.node(f"{COMPILATION}.caching:{name}")]
        if node is not None and asks_for_environment(node, hashed_by)
    }
    folders, traced, unkeyed, by_name = [], [], [], []
    for module, source in tree.mentioning(FOLDERS | {hashed_by}, COMPILATION):
        by_name += [
            module
            for node in ast.walk(source)
            if isinstance(node, ast.ImportFrom)
            and node.module == "vllm.envs"
            and hashed_by in {alias.name for alias in node.names}
        ]
        for node in ast.walk(source):
            if not isinstance(node, FUNCTIONS) or not names_folder(node):
                continue
            place = (module, node.name)
            folders.append(place)
            if "code_hash" in words(node):
                traced.append(place)
            if not (asks_for_environment(node, hashed_by) or keyed & words(node)):
                unkeyed.append(place)
    return Key(hashed_by, *map(tuple, (folders, traced, unkeyed, by_name)))  # type: ignore[arg-type]


def asks_for_environment(node: ast.AST, hashed_by: str) -> bool:
    """Whether it calls the function as an attribute of the module, as `envs.compile_factors()`."""
    return any(ast.unparse(call.func) == f"envs.{hashed_by}" for call in calls(node, hashed_by))


def names_folder(node: ast.AST) -> bool:
    """Whether it joins a path with the folder's name, itself and not in a function in it."""
    inner = [
        other for other in ast.walk(node) if isinstance(other, FUNCTIONS) and other is not node
    ]
    if any(names_folder(other) for other in inner):
        return False
    return any(
        isinstance(argument, ast.Constant) and argument.value in FOLDERS
        for call in calls(node, "join")
        for argument in call.args
    )


def in_words(root: Path) -> str:
    """The column of docs/releases.md."""
    key = key_of(Tree(root, "vllm"))
    if key.unkeyed:
        return "not told apart"
    ahead = [place for place in key.folders if place not in key.traced]
    text = "factor and sources" if key.traced else "factor"
    return f"{text}; AOT: factor" if ahead else text
