"""Each release's compile cache tells patched graphs from others: read, and its function run."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import types
from collections.abc import Mapping
from typing import Any

import drift_sources
import pytest
from compile_cache import COMPILATION, key_of
from packaging.version import Version
from release_tree import Tree, parsed

from ascend_patch import _hooks, _steps

each_release = pytest.mark.parametrize("release", drift_sources.releases("vllm"))


def tree_of(release: str) -> Tree:
    return Tree(drift_sources.root_of("vllm", release), "vllm")


@each_release
def test_each_folder_of_compiled_graphs_is_named_by_the_environment(release: str) -> None:
    """So our factor, which is in the environment's hash, is in each key."""
    key = key_of(tree_of(release))
    assert key.folders
    assert key.unkeyed == ()
    # A wrapped `compute_hash`, and a variable that was added, are seen where it is an attribute.
    assert key.by_name == ()


@each_release
def test_where_the_source_of_our_code_is_no_part_of_the_key(release: str) -> None:
    """The graphs of Inductor are named by what was traced, our files among it.

    Those compiled ahead of time are named before anything is traced: there the factor alone tells
    them apart, until they are loaded.
    """
    key = key_of(tree_of(release))
    inductor = [place for place in key.folders if place[0] == f"{COMPILATION}.backends"]
    ahead = [place for place in key.folders if place[0] == f"{COMPILATION}.decorators"]
    assert inductor
    assert set(inductor) == set(key.traced)
    assert bool(ahead) == (Version(release) >= Version("0.11.1"))
    assert not set(ahead) & set(key.traced)


class Everything(dict[str, Any]):
    """`environment_variables`: what the release names, each of them None."""

    def __missing__(self, name: str) -> Any:
        return lambda: None

    def __contains__(self, name: object) -> bool:
        return True


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions import inside; nothing of vLLM."""
    for name in ("vllm", "vllm.config", "vllm.config.utils", "vllm.platforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["vllm.config.utils"], "normalize_value", str, raising=False)
    platform = types.SimpleNamespace(device_control_env_var="CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sys.modules["vllm.platforms"], "current_platform", platform, raising=False)


def environment(tree: Tree, hashed_by: str, variables: Mapping[str, Any]) -> types.ModuleType:
    """A module with the release's function, and variables of our own."""
    file = tree.file("vllm.envs")
    assert file is not None
    kept = [
        node
        for node in parsed(file).body
        if isinstance(node, ast.FunctionDef) and node.name == hashed_by
    ]
    module = types.ModuleType("envs")
    vars(module).update(
        os=os,
        hashlib=hashlib,
        Any=Any,
        logger=types.SimpleNamespace(debug=print, warning=print),
        environment_variables=variables,
    )
    exec(compile(ast.Module(kept, []), str(file), "exec"), vars(module))
    return module


@each_release
@pytest.mark.usefixtures("stubs")
def test_the_release_s_own_function_gives_each_set_of_patches_another_key(release: str) -> None:
    tree = tree_of(release)
    hashed_by = key_of(tree).hashed_by

    def key(digest: str) -> str:
        variables = Everything() if hashed_by == "compute_hash" else {"VLLM_USE_V1": lambda: True}
        envs = environment(tree, hashed_by, variables)
        _hooks.key_compile_cache(envs, types.SimpleNamespace(digest=digest))  # type: ignore[arg-type]
        found = getattr(envs, hashed_by)()
        return found if isinstance(found, str) else repr(sorted(found.items()))

    keys = [key(digest) for digest in ("", "digest 1", "digest 2", "digest 1")]
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]
    assert "digest 1" in keys[1]
    assert "digest" not in keys[0]


# --- the shim's other hooks ---------------------------------------------------------------------


@each_release
def test_the_hooks_find_what_they_wrap(release: str) -> None:
    tree = tree_of(release)
    assert tree.parameters(f"{_hooks.MODEL_LOADER}:get_model_loader")[:1] == ["load_config"]
    base = f"{_hooks.MODEL_LOADER}.base_loader:BaseModelLoader.load_model"
    assert "model_config" in tree.parameters(base)
    first = [f"{module}:{_hooks.RAY_EXECUTOR_CLASS}" for module in _hooks.RAY_EXECUTORS]
    first = [place for place in first if tree.has(place)]
    second = f"{_hooks.RAY_EXECUTOR_V2}:{_hooks.RAY_EXECUTOR_V2_CLASS}"
    for place in first:
        wrapped = tree.parameters(f"{place}._init_workers_ray")
        assert wrapped == ["self", "placement_group", "ray_remote_kwargs"]
    if tree.has(second):
        assert tree.parameters(f"{second}._build_runtime_env") == ["self"]
    assert first or tree.has(second), "no Ray executor is known"
    workers = [f"{module}:{_steps.WRAPPER_CLASS}" for module in _steps.WORKER_BASES]
    assert any(tree.has(place) for place in workers)


@each_release
def test_no_other_ray_executor_starts_workers(release: str) -> None:
    """One that we do not know would start workers without our variables."""
    known = {*_hooks.RAY_EXECUTORS, _hooks.RAY_EXECUTOR_V2}
    tree = tree_of(release)
    packages = [p for p in ("vllm.v1.executor", "vllm.executor") if tree.file(p)]
    found = {
        module
        for package in packages
        for module, source in tree.mentioning({"placement_group"}, package)
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef) and "Executor" in node.name
    }
    assert found
    assert found <= known
