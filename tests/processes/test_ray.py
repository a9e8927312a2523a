"""Ray workers get the variables when their interpreter starts, through vLLM's own executor.

A real Ray cluster that was started without our variables, as a cluster usually is; vLLM's real
RayDistributedExecutor then makes its worker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"missing: {name}")
        for name in ("ray", "vllm")
    ),
]

# The executor is stopped by the first thing that it asks a worker without an accelerator; by then
# the worker's process has imported vLLM, which is what is looked at.
DRIVER = """
import json, os, sys, time, types
import ray
from ray.util.placement_group import placement_group

ray.init(num_cpus=2, resources={"NPU": 1}, include_dashboard=False, _node_ip_address="127.0.0.1",
         runtime_env=json.loads(sys.argv[4]))
group = placement_group([{"NPU": 1, "CPU": 1}])
ray.get(group.ready(), timeout=60)
os.environ.update(json.loads(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
if sys.argv[3] == "open":
    from ascend_patch import _bootstrap
    _bootstrap.open_door("run")
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor import RayDistributedExecutor
type(current_platform).ray_device_key = "NPU"
executor = object.__new__(RayDistributedExecutor)
executor.parallel_config = types.SimpleNamespace(
    ray_workers_use_nsight=False, world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1)
try:
    executor._init_workers_ray(group)
except Exception as error:
    print("stopped by", type(error).__name__)
from ascend_patch import _status
found = [[p["role"], p["door"], p["selection"]] for r in _status.runs() for p in r["processes"]]
print(json.dumps(found))
ray.shutdown()
"""


def processes(
    tmp_path: Path, door: str, path: str = str(ROOT), job: dict | None = None
) -> list[list[str]]:
    wanted = {
        "ASCEND_PATCHES": "all",
        "ASCEND_PATCHES_STATUS_DIR": str(tmp_path / "status"),
        "PYTHONPATH": path,
    }
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ASCEND_PATCHES", "PYTHONPATH"))
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(wanted), str(ROOT), door, json.dumps(job or {})],
        env={**clean, "VLLM_HOST_IP": "127.0.0.1", "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_worker_s_door_is_open_when_it_starts(tmp_path):
    found = processes(tmp_path, "open")
    assert ["ray worker", "sitecustomize", "all"] in found
    assert all(role in ("front end", "ray worker") for role, _, _ in found)


@pytest.mark.parametrize(
    ("path", "job"),
    [
        (f"{ROOT}/.", {}),
        (f"{ROOT}//", {"env_vars": {"PYTHONPATH": "/theirs:${PYTHONPATH}", "A": "b"}}),
    ],
    ids=["spelling", "of a whole job"],
)
def test_however_the_path_is_spelled_and_whatever_a_user_set(path, job, tmp_path):
    assert ["ray worker", "sitecustomize", "all"] in processes(tmp_path, "open", path, job)


def test_without_the_hook_a_worker_has_no_door(tmp_path):
    assert processes(tmp_path, "closed") == []


def test_engines_that_are_actors_are_given_the_shim_s_variables(tmp_path):
    """vLLM's own function puts the environment of `--data-parallel-backend ray` together."""
    code = (
        "import json, os\n"
        "from vllm.v1.engine import utils\n"
        "names = utils.get_env_vars_to_copy(destination='EngineCoreActor')\n"
        "print(json.dumps({name: os.environ[name] for name in names if name in os.environ}))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND_PATCHES")}
    environment |= {"PYTHONPATH": f"{ROOT}/.", "ASCEND_PATCHES_STATUS_DIR": str(tmp_path)}
    found = {}
    for patches in ("all", "none"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "ASCEND_PATCHES": patches},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[patches] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["all"]["ASCEND_PATCHES"] == "all"
    assert found["all"]["PYTHONPATH"] == str(ROOT)
    assert "ASCEND_PATCHES_RUN" in found["all"]
    assert not {"ASCEND_PATCHES", "PYTHONPATH"} & set(found["none"])
