"""Real vLLM servers with the shim installed in each of its forms; `tests/robustness` has fakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import _server
import pytest
from interpreters import find_python
from server import READY_SECONDS, Lab, Setup

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "robustness"))

from installs import WAYS, House, Workshop, contents

pytestmark = pytest.mark.slow
SETUP = Setup()


class Prefixed(_server.Server):
    """A server whose command line has words before it, such as `ascend-patch run --`."""

    before: tuple[str, ...] = ()

    def command(self) -> list[str]:
        return [*self.before, *super().command()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def add_vllm(house: House, plain: Path) -> None:
    """Let an environment see the packages of the one that has vLLM and no shim."""
    (site,) = plain.parents[1].glob("lib/python3*/site-packages")
    (house.site / "zz_vllm.pth").write_text(f"import site; site.addsitedir({str(site)!r})\n")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_real_server_starts_patched(way, workshop, lab: Lab, tmp_path: Path) -> None:
    python = find_python()
    if python.plain == python.patched:
        pytest.skip("there is no environment with vLLM alone; scripts/test makes one")
    way = way(workshop)
    add_vllm(way.house, python.plain)
    before = contents(way.house.site)
    env = _server.inherited() | _server.base_variables() | _server.cpu_variables()
    env |= {
        "LD_PRELOAD": python.preload,
        "ASCEND_PATCHES": "all",
        "ASCEND_PATCHES_STATUS_DIR": str(tmp_path / "status"),
        "VLLM_CACHE_ROOT": str(lab.folder / "vllm-cache-installs"),
        "TORCHINDUCTOR_CACHE_DIR": lab.inductor,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if way.path:
        env["PYTHONPATH"] = ":".join(map(str, way.path))
    server = Prefixed(
        way.house.python,
        str(lab.model(SETUP.dtype, SETUP.model)),
        env=env,
        log=tmp_path / "log.txt",
        arguments=SETUP.arguments(),
        ready_seconds=READY_SECONDS,
    )
    server.before = way.before
    with server:
        assert server.complete("The people know how to make", max_tokens=4)["choices"][0]["text"]
        processes = status(server, way.before)
    found = {
        process["role"]: {patch["id"]: patch["state"] for patch in process["patches"]}
        for process in processes
    }
    assert found["EngineCore"]["rotary"] == "applied", found
    assert set(found) == {"front end", "EngineCore"}
    # Where vLLM's cache is empty, a helper that looked at the model's class has been one too.
    assert not any(process["problems"] for process in processes)
    assert contents(way.house.site) == before


def status(server: _server.Server, before: tuple[str, ...]) -> list[dict]:
    """The processes of the newest run, as `ascend-patch status` of that environment says."""
    env = {k: v for k, v in server.env.items() if k not in ("ASCEND_PATCHES", "LD_PRELOAD")}
    done = subprocess.run(
        [*before, str(server.python), "-m", "ascend_patch", "status", "--json"],
        cwd="/",
        env=env | ({"ASCEND_PATCHES": "none"} if before else {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["runs"][0]["processes"]
