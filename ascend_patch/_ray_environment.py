"""What a Ray worker must have in its environment, so that its interpreter starts with the shim.

vLLM copies variables to its workers once they run, which is too late for sitecustomize. A runtime
environment is there when the interpreter starts; what a user has set in it stays in force.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ascend_patch import _bootstrap

CARRIED_PREFIX = "ASCEND_PATCHES"
PATH = "PYTHONPATH"
PACKAGE = os.path.dirname(os.path.abspath(__file__))
ROOT, STARTUP = os.path.dirname(PACKAGE), os.path.join(PACKAGE, "startup")
# Fields of a runtime environment that give a worker another interpreter, or another file system.
INTERPRETERS = ("py_executable", "conda")
IMAGES = ("container", "image_uri")


def add_to(runtime_env: dict[str, Any]) -> list[str]:
    """Put the shim's variables, and PYTHONPATH where it is needed, into a runtime environment.

    Args:
        runtime_env: Of the workers that are going to be started; changed in place.

    Returns:
        Sentences about workers that may start without the shim all the same.
    """
    job = _of_the_job()
    of_job = job.get("env_vars") or {}
    environment = runtime_env.setdefault("env_vars", {})
    # A worker's own value hides that of the job, so what a user set for the job counts as set.
    for name, value in variables().items():
        if name not in of_job:
            environment.setdefault(name, value)
    fields = {**job, **{name: value for name, value in runtime_env.items() if value}}
    elsewhere = _with_another_interpreter(fields)
    path = path_for_workers(environment.get(PATH, of_job.get(PATH)), elsewhere=bool(elsewhere))
    if path is not None:
        environment[PATH] = path
        elsewhere += _on_other_nodes()
    return elsewhere


def variables() -> dict[str, str]:
    """The shim's own variables of this process."""
    return {name: value for name, value in os.environ.items() if name.startswith(CARRIED_PREFIX)}


def add_to_environ(names: Iterable[str]) -> set[str]:
    """The names of variables to copy to engines that run as actors, with those of the shim.

    vLLM reads the values out of `os.environ` at once, so a PYTHONPATH that leads to the shim is
    put there: the same entries as absolute paths, and those of the shim in front.
    """
    of_job = _of_the_job().get("env_vars") or {}
    found = set(names) | {name for name in variables() if name not in of_job}
    path = path_for_workers(of_job.get(PATH))
    if path is not None:
        os.environ[PATH] = path
        found.add(PATH)
    return found


def path_for_workers(theirs: str | None, *, elsewhere: bool = False) -> str | None:
    """The PYTHONPATH with which a worker's interpreter finds the shim; None if it needs none.

    Args:
        theirs: What a user set for the workers; by default they get this process's own entries.
        elsewhere: Whether the workers have an interpreter in which the shim may not be installed.
    """
    entries = [os.path.abspath(entry) for entry in _split(os.environ.get(PATH))]
    needed = [entry for entry in entries if _is_the_shim(entry)]
    if not needed:
        # Activated by the .pth of an install, which the same interpreter reads in each worker.
        if "pth" in _bootstrap.doors and not elsewhere:
            return None
        needed = [STARTUP]
    given = entries if theirs is None else _split(theirs)
    there = {_normal(entry) for entry in given}
    front = [entry for entry in dict.fromkeys(needed) if _normal(entry) not in there]
    return os.pathsep.join([*front, *given])


def _is_the_shim(entry: str) -> bool:
    return _normal(entry) in (_normal(ROOT), _normal(STARTUP))


def _normal(entry: str) -> str:
    return os.path.realpath(entry)


def _split(path: str | None) -> list[str]:
    return path.split(os.pathsep) if path else []


def _of_the_job() -> Mapping[str, Any]:
    """The runtime environment that workers inherit; empty where Ray does not tell."""
    ray = sys.modules.get("ray")
    try:
        # Without a connection the question alone would start a cluster.
        if ray is None or not ray.is_initialized():
            return {}
        return dict(ray.get_runtime_context().runtime_env)
    except Exception:
        # Not worth a server: a user's PYTHONPATH for the whole job is then not known.
        return {}


def _on_other_nodes() -> list[str]:
    """A sentence where workers may run on a node that has no such folder."""
    ray = sys.modules.get("ray")
    try:
        if ray is None or not ray.is_initialized():
            return []
        alive = sum(bool(node.get("Alive")) for node in ray.nodes())
    except Exception:
        # Not worth a server: how many nodes there are is then not known.
        return []
    if alive < 2:
        return []
    return [
        f"Ray has {alive} nodes, and workers find the shim by PYTHONPATH, at {PACKAGE}: it has to "
        "be at the same path on each of them, or ascend-patch installed there"
    ]


def _with_another_interpreter(fields: Mapping[str, Any]) -> list[str]:
    """A sentence for each field with which the interpreter of the workers is another one."""
    found = []
    for name in IMAGES:
        if fields.get(name):
            found.append(
                f"Ray's workers run in an image ({name}={fields[name]!r}), whose Python starts "
                "without Ascend Patch unless ascend-patch is installed in it"
            )
    for name in INTERPRETERS:
        value = fields.get(name)
        if value and value != sys.executable:
            found.append(
                f"Ray's workers run in another Python environment ({name}={value!r}); the shim is "
                f"on their PYTHONPATH, and needs wrapt, packaging and Python 3.10 or later there: "
                "look at `ascend-patch status`, which names each process that is patched"
            )
    return found
