"""The shim's own hooks in vLLM, on modules that look like those of several releases."""

from __future__ import annotations

import types

import pytest
import wrapt

from ascend_patch import _bootstrap, _hooks, _ray_environment
from ascend_patch._runtime import Refusal


def envs(source: str) -> types.ModuleType:
    module = types.ModuleType("vllm.envs")
    exec(source, vars(module))
    return module


NEW = (
    "environment_variables = {'VLLM_X': lambda: 1}\n"
    "def compile_factors():\n"
    "    return {name: get() for name, get in environment_variables.items()}\n"
)
OLD = "environment_variables = {}\ndef compute_hash():\n    return 'hash of a fixed list'\n"


def runtime(digest: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(digest=digest)


def test_nothing_planned_leaves_the_factors_as_they_were():
    module = envs(NEW)
    _hooks.key_compile_cache(module, runtime(""))
    assert module.compile_factors() == {"VLLM_X": 1}


def test_planned_patches_are_one_more_factor():
    module = envs(NEW)
    _hooks.key_compile_cache(module, runtime("abc"))
    assert module.compile_factors() == {"VLLM_X": 1, _hooks.KEY_VARIABLE: "abc"}


@pytest.mark.parametrize(("digest", "found"), [("", ""), ("abc", "-abc"), ("other", "-other")])
def test_a_release_that_hashes_a_fixed_list_has_its_hash_extended(digest, found):
    module = envs(OLD)
    _hooks.key_compile_cache(module, runtime(digest))
    assert module.compute_hash() == f"hash of a fixed list{found}"


def model_loader(loader) -> types.ModuleType:
    module = types.ModuleType("vllm.model_executor.model_loader")
    module.get_model_loader = lambda load_config: loader
    return module


class Loader:
    def load_model(self, *, prefix=""):
        return f"model {prefix}"


Sealed = type("Sealed", (), {"__slots__": (), "load_model": Loader.load_model})


@pytest.mark.parametrize(("loader", "told"), [(Loader(), 1), (Sealed(), 0)], ids=["open", "sealed"])
def test_a_model_is_loaded_and_told_where_the_loader_allows_it(loader, told):
    times = []
    module = model_loader(loader)
    found = types.SimpleNamespace(model_is_loaded=times.append)
    _hooks.tell_when_loaded(module, found)
    assert module.get_model_loader(None).load_model(prefix="x") == "model x"
    assert times == ["model x"] * told


def test_a_hook_that_somebody_replaces_is_named_and_one_that_is_wrapped_is_not(monkeypatch):
    monkeypatch.setattr(_hooks, "_placed", {})
    module = model_loader(Loader())
    _hooks.tell_when_loaded(module, runtime(""))
    ours = module.get_model_loader
    assert _hooks.lost() == []
    module.get_model_loader = wrapt.FunctionWrapper(ours, lambda f, _, a, k: f(*a, **k))
    assert _hooks.lost() == []
    module.get_model_loader = types.FunctionType(
        (lambda config: None).__code__, {"__name__": "stranger.lib"}, "theirs"
    )
    (said,) = _hooks.lost()
    assert said.startswith("our hook on vllm.model_executor.model_loader.get_model_loader was ")
    assert "of stranger.lib: patches are neither tested nor looked at again" in said
    module.get_model_loader = ours
    assert _hooks.lost() == []


def test_a_refusal_after_the_model_is_loaded_ends_the_process():
    def refuse(model):
        raise Refusal("no")

    module = model_loader(Loader())
    _hooks.tell_when_loaded(module, types.SimpleNamespace(model_is_loaded=refuse))
    with pytest.raises(SystemExit, match="ascend-patch: no"):
        module.get_model_loader(None).load_model()


def test_a_fault_while_targets_are_looked_at_again_is_recorded_and_no_more(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    found = host.run(
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "from ascend_patch._apply import Applier\n"
        "Applier.check = lambda self: 1 / 0\n"
        "print(get_model_loader().load_model())\n",
        fails=True,
    )
    assert (found.code, found.out) == (0, "model\n")
    assert any("ZeroDivisionError" in problem for problem in found.state["problems"])


def test_a_release_without_a_seam_is_served_and_the_problem_is_named(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    host.write("vllm.model_executor.model_loader", "def load():\n    return 'model'\n")
    found = host.run("from vllm.model_executor.model_loader import load\nprint(load())", fails=True)
    assert (found.code, found.out) == (0, "model\n")
    assert any("get_model_loader" in problem for problem in found.state["problems"])


class RayDistributedExecutor:
    def _init_workers_ray(self, placement_group, **ray_remote_kwargs):
        return placement_group, ray_remote_kwargs


@pytest.fixture
def executor(monkeypatch):
    """A fake executor with our hook, in an environment with two of our variables."""
    monkeypatch.setenv("ASCEND_PATCHES", "all")
    monkeypatch.setenv("ASCEND_PATCHES_RUN", "20260101T000000-1")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    # As where the shim is installed: nothing but the variables is needed.
    monkeypatch.setattr(_bootstrap, "doors", ["pth"])
    copy = type("RayDistributedExecutor", (), dict(vars(RayDistributedExecutor)))
    _hooks.carry_to_ray(types.SimpleNamespace(RayDistributedExecutor=copy))
    return copy()


OURS = {"ASCEND_PATCHES": "all", "ASCEND_PATCHES_RUN": "20260101T000000-1"}


def test_ray_workers_get_our_variables_at_process_start(executor):
    group, given = executor._init_workers_ray("group", num_gpus=1)
    assert group == "group"
    assert given == {"num_gpus": 1, "runtime_env": {"env_vars": OURS}}


def test_what_a_user_gives_ray_workers_wins_and_is_kept(executor):
    theirs = {"working_dir": "/w", "env_vars": {"ASCEND_PATCHES": "none", "A": "b"}}
    _, given = executor._init_workers_ray("group", runtime_env=theirs)
    assert given["runtime_env"]["working_dir"] == "/w"
    assert given["runtime_env"]["env_vars"] == {**OURS, "ASCEND_PATCHES": "none", "A": "b"}


class RayExecutorV2:
    def _build_runtime_env(self):
        return {"working_dir": "/w", "env_vars": {"ASCEND_PATCHES": "none", "A": "b"}}


def test_workers_of_the_second_ray_executor_get_them_too(executor):
    copy = type("RayExecutorV2", (), dict(vars(RayExecutorV2)))
    _hooks.carry_to_ray_v2(types.SimpleNamespace(RayExecutorV2=copy))
    given = copy()._build_runtime_env()
    assert given["working_dir"] == "/w"
    assert given["env_vars"] == {**OURS, "ASCEND_PATCHES": "none", "A": "b"}


def test_workers_in_an_image_are_a_problem_of_the_state(executor, capsys):
    written = []
    state = types.SimpleNamespace(problems=[], write=lambda: written.append(1))
    copy = type("RayDistributedExecutor", (), dict(vars(RayDistributedExecutor)))
    module = types.SimpleNamespace(RayDistributedExecutor=copy)
    _hooks.carry_to_ray(module, runtime=types.SimpleNamespace(state=state))
    for _ in range(2):
        copy()._init_workers_ray("group", runtime_env={"image_uri": "registry/vllm:1"})
    (problem,) = state.problems
    assert problem.startswith("Ray's workers run in an image (image_uri='registry/vllm:1')")
    assert written == [1]
    assert problem in capsys.readouterr().err


def test_engines_that_are_actors_get_them_too(executor):
    module = types.ModuleType("utils")
    module.get_env_vars_to_copy = lambda x, *, y: {x, y}
    _hooks.carry_to_ray_engines(module)
    assert module.get_env_vars_to_copy("VLLM_X", y="VLLM_Y") == {"VLLM_X", "VLLM_Y", *OURS}


def test_a_release_without_engines_that_are_actors_is_left_alone():
    module = types.SimpleNamespace()
    _hooks.carry_to_ray_engines(module)
    assert vars(module) == {}


ROOT = "{root}"
STARTUP = "{root}/ascend_patch/startup"


@pytest.mark.parametrize(
    ("own", "theirs", "doors", "expected"),
    [
        # Installed: workers read the same .pth.
        (None, None, ["pth"], None),
        ("/elsewhere", None, ["pth"], None),
        ("/elsewhere", "/theirs", ["pth"], None),
        # From PYTHONPATH: this process's entries, or the shim's in front of what a user set.
        (f"/elsewhere:{ROOT}", None, ["sitecustomize"], f"/elsewhere:{ROOT}"),
        (f"/elsewhere:{ROOT}", "/theirs", ["sitecustomize"], f"{ROOT}:/theirs"),
        (f"{STARTUP}:/elsewhere", "/theirs", ["sitecustomize"], f"{STARTUP}:/theirs"),
        (f"{ROOT}:{STARTUP}", "/theirs", ["sitecustomize"], f"{ROOT}:{STARTUP}:/theirs"),
        (f"{ROOT}", f"/theirs:{ROOT}/.", ["sitecustomize"], f"/theirs:{ROOT}/."),
        (f"{ROOT}", "", ["sitecustomize"], f"{ROOT}"),
        # PYTHONPATH has another copy than the .pth: the one that runs here runs there.
        (f"{ROOT}", None, ["pth", "sitecustomize"], f"{ROOT}"),
        # Neither says where it came from: the folder alone is enough.
        (None, None, [], STARTUP),
        ("/elsewhere", None, [], f"{STARTUP}:/elsewhere"),
        (None, "/theirs:${PYTHONPATH}", [], f"{STARTUP}:/theirs:${{PYTHONPATH}}"),
    ],
)
def test_the_path_that_ray_workers_get(own, theirs, doors, expected, monkeypatch):
    def filled(text):
        return text and text.replace("{root}", _ray_environment.ROOT)

    monkeypatch.setattr(_bootstrap, "doors", doors)
    if own is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", filled(own))
    assert _ray_environment.path_for_workers(filled(theirs)) == filled(expected)


@pytest.fixture
def ray(monkeypatch):
    """A connected Ray whose job has a runtime environment; returns that."""
    job = {}
    context = types.SimpleNamespace(runtime_env=job)
    module = types.ModuleType("ray")
    module.is_initialized = lambda: True
    module.get_runtime_context = lambda: context
    monkeypatch.setitem(__import__("sys").modules, "ray", module)
    return job


def test_what_a_user_gives_to_a_whole_ray_job_wins_too(executor, ray):
    ray["env_vars"] = {"ASCEND_PATCHES": "none", "A": "b"}
    _, given = executor._init_workers_ray("group")
    assert given["runtime_env"]["env_vars"] == {"ASCEND_PATCHES_RUN": OURS["ASCEND_PATCHES_RUN"]}


@pytest.mark.parametrize(
    ("doors", "alive", "named"),
    [
        (["sitecustomize"], [True, True, False], True),
        (["sitecustomize"], [True, False], False),
        # Installed: each node has an environment of its own, and nothing is found by a path.
        (["pth"], [True, True], False),
    ],
)
def test_a_path_that_other_nodes_may_not_have_is_said(
    doors, alive, named, executor, ray, monkeypatch, capsys
):
    import sys

    monkeypatch.setattr(_bootstrap, "doors", doors)
    sys.modules["ray"].nodes = lambda: [{"Alive": value} for value in alive]
    executor._init_workers_ray("group")
    said = capsys.readouterr().err
    assert ("Ray has 2 nodes, and workers find the shim by PYTHONPATH" in said) == named


def test_a_ray_that_is_not_connected_is_not_asked(executor, ray, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)
    monkeypatch.setattr(sys.modules["ray"], "get_runtime_context", lambda: 1 / 0)
    sys.modules["ray"].nodes = lambda: 1 / 0
    _, given = executor._init_workers_ray("group")
    assert given["runtime_env"]["env_vars"] == OURS
