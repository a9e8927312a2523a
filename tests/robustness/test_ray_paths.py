"""Ray workers start with the shim, however PYTHONPATH is spelled and whatever a user set for them.

A worker here is a bare interpreter that is started with the variables of the runtime environment
alone, as Ray starts one; tests/processes/test_ray.py does it with a real Ray.
"""

from __future__ import annotations

import os
import sys
import types

import pytest
from installs import ROOT, House, base_python

from ascend_patch import _bootstrap, _hooks

STARTUP = ROOT / "ascend_patch" / "startup"


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> House:
    return House.build(tmp_path_factory.mktemp("worker") / "house", base_python())


@pytest.fixture(params=["v1", "v2"])
def build(request, monkeypatch):
    """What one of vLLM's two executors gives its workers; `given` is a user's runtime_env."""
    monkeypatch.setenv("ASCEND_PATCHES", "all")
    # This process has the shim without any .pth: from PYTHONPATH, or from a test's sys.path.
    monkeypatch.setattr(_bootstrap, "doors", ["sitecustomize"])
    monkeypatch.setattr(_hooks, "_placed", {})

    class RayDistributedExecutor:
        def _init_workers_ray(self, placement_group, **ray_remote_kwargs):
            return ray_remote_kwargs["runtime_env"]

    class RayExecutorV2:
        def __init__(self, given):
            self.given = given

        def _build_runtime_env(self):
            return self.given

    def run(given):
        if request.param == "v1":
            module = types.SimpleNamespace(RayDistributedExecutor=RayDistributedExecutor)
            _hooks.carry_to_ray(module)
            return RayDistributedExecutor()._init_workers_ray(None, runtime_env=given)
        _hooks.carry_to_ray_v2(types.SimpleNamespace(RayExecutorV2=RayExecutorV2))
        return RayExecutorV2(given)._build_runtime_env()

    return run


def doors_of(worker: House, runtime_env: dict) -> list[str]:
    """The ways in which a worker with this environment is activated."""
    variables = dict(runtime_env.get("env_vars", {}))
    patches = variables.pop("ASCEND_PATCHES", "")
    return worker.boot(patches=patches, **variables)["doors"]


SPELLINGS = {
    "slash": "{root}/",
    "double slash": "/{root}//",
    "dot": "{root}/.",
    "dots": "{root}/ascend_patch/..",
    "double inside": "{parent}//{name}",
    "relative": "{relative}",
    "link": "{link}",
    "among others": "/elsewhere:{root}/:/other",
    "plain": "{root}",
}


@pytest.mark.fault("ray_pythonpath_spelling")
@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "plain"])
def test_every_spelling_reaches_the_workers(spelling, build, worker, monkeypatch, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    path = SPELLINGS[spelling].format(
        root=ROOT, parent=ROOT.parent, name=ROOT.name, relative=os.path.relpath(ROOT), link=link
    )
    monkeypatch.setenv("PYTHONPATH", path)
    assert doors_of(worker, build({})) == ["sitecustomize"]


@pytest.mark.fault("ray_pythonpath_spelling")
@pytest.mark.parametrize("folder", [ROOT, STARTUP], ids=["checkout", "startup"])
@pytest.mark.parametrize("theirs", ["/theirs", "", "/theirs:${PYTHONPATH}"])
def test_a_user_s_pythonpath_stays_behind_the_shim(folder, theirs, build, worker, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    runtime_env = build({"env_vars": {"PYTHONPATH": theirs, "A": "b"}})
    assert doors_of(worker, runtime_env) == ["sitecustomize"]
    assert runtime_env["env_vars"]["A"] == "b"
    assert runtime_env["env_vars"]["PYTHONPATH"].endswith(theirs)


def test_a_spelling_of_another_folder_is_not_taken_for_it(build, worker, monkeypatch, tmp_path):
    """The control: the workers' path has the entries of this process, and only the shim besides."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/")
    monkeypatch.setattr(_bootstrap, "doors", ["pth"])
    runtime_env = build({})
    assert "PYTHONPATH" not in runtime_env["env_vars"]
    # Nothing is installed in this worker's interpreter.
    assert doors_of(worker, runtime_env) == []


@pytest.mark.fault("ray_pythonpath_spelling")
@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("image_uri", "registry/vllm:1", "unless ascend-patch is installed in it"),
        ("container", {"image": "vllm"}, "unless ascend-patch is installed in it"),
        ("conda", "serving", "needs wrapt, packaging and Python 3.10"),
        ("py_executable", "/opt/other/python", "needs wrapt, packaging and Python 3.10"),
    ],
)
def test_workers_of_another_interpreter_are_named(field, value, part, build, monkeypatch, capsys):
    monkeypatch.setattr(_bootstrap, "doors", ["pth"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    runtime_env = build({field: value})
    said = capsys.readouterr().err
    assert f"({field}={value!r})" in said
    assert part in said
    # There the .pth of this environment is not read, and the folder is at least tried.
    assert runtime_env["env_vars"]["PYTHONPATH"] == str(STARTUP)


@pytest.mark.parametrize("given", [{}, {"py_executable": sys.executable}, {"pip": ["x"]}])
def test_workers_of_the_same_interpreter_are_not(given, build, monkeypatch, capsys):
    monkeypatch.setattr(_bootstrap, "doors", ["pth"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in build(given)["env_vars"]
    assert capsys.readouterr().err == ""
