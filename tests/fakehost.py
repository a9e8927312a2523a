"""A fake `vllm` in a temporary folder, patches for it, and processes that import it.

A subprocess costs 0.2 s instead of the ten that the real vLLM takes to import. The code under test
is the real one: only the list of patches and the recorded fingerprints are the test's own, and
those are recorded from the fake sources with the real fingerprint code.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_patch import _fingerprint

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLOCK_SECONDS = 60

SOURCES = {
    "vllm": "from vllm._version import __version__\n",
    "vllm._version": "__version__ = version = '1.0'\n",
    "vllm.envs": (
        "environment_variables = {'VLLM_X': lambda: 1}\n"
        "def compile_factors():\n"
        "    return {name: get() for name, get in environment_variables.items()}\n"
    ),
    "vllm.ops": (
        "def f(x):\n    return ['f', x]\n\n"
        "class Layer:\n    def forward(self, x):\n        return ['forward', x]\n"
    ),
    "vllm.more": "def g(x):\n    return ['g', x]\n",
    "vllm.user": "from vllm.ops import f\n\ndef call(x):\n    return f(x)\n",
    "vllm.model_executor": "",
    "vllm.model_executor.model_loader": (
        "class Loader:\n    def load_model(self):\n        import vllm.ops\n"
        "        return 'model'\n\n"
        "def get_model_loader(load_config=None):\n    return Loader()\n"
    ),
}
REPLACEMENTS = """
def outer(wrapped, instance, args, kwargs):
    return ["ours", *wrapped(*args, **kwargs)]

def factory(original):
    def ours(x):
        return ["ours", *original(x)]
    return ours

def method_factory(original):
    def ours(self, x):
        return ["ours", *original(self, x)]
    return ours

def other_parameters(original):
    def ours(x, y):
        return original(x)
    return ours

def raises_value_error(original):
    raise ValueError("a fault was put here")

def raises_system_exit(original):
    raise SystemExit(3)

def raises_generator_exit(original):
    raise GeneratorExit
"""
# What the fake environment's sitecustomize does instead of ours: the same door, with our patches.
DOOR = """
import os
if os.environ.get("FAKE_DOOR") == "open":
    import fakepatches
    from ascend_patch import _bootstrap
    _bootstrap.open_door("sitecustomize")
"""
PATCHES = """
import json
from pathlib import Path
from ascend_patch import _records, _registry
from ascend_patch._registry import Band, Patch, Target

def patch(id, *targets, version="1", versions="==1.0", host="vllm", retired="", **more):
    band = Band(host, versions, () if retired else ("1.0",), tuple(targets), retired)
    texts = dict(summary="s", why="w", upstream="u", remove_when="r")
    return Patch(id=id, version=version, bands=(band,), **texts, **more)

def target(symbol, seam="host", replacement="replacements:outer", **more):
    return Target(symbol, seam, replacement, **more)

records = json.loads(Path(__file__).with_name("records.json").read_text())
_records._data = lambda host: records.get(host, {})

PATCHES = [%s]
_ordered = _registry.order(PATCHES)
_registry.load = lambda: _ordered
"""
# torch takes seconds to import, and the seams under test need this one function of it.
TORCH = {"torch": "", "torch.compiler": "def is_compiling():\n    return False\n"}


@dataclass(frozen=True)
class Outcome:
    """A finished process: what it printed, and every status file of its run."""

    code: int
    out: str
    err: str
    states: list[dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """The record of the only process."""
        assert len(self.states) == 1, self.states
        return self.states[0]

    @property
    def value(self) -> Any:
        """What the script printed, as JSON."""
        return json.loads(self.out)

    def patch(self, name: str) -> dict[str, Any]:
        """One patch in the only process."""
        return next(patch for patch in self.state["patches"] if patch["id"] == name)


class FakeHost:
    """Writes the fake packages, and runs scripts against them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        self.status = folder / "status"
        for module, source in {**SOURCES, **TORCH, "replacements": REPLACEMENTS}.items():
            self.write(module, source)
        self.write("sitecustomize", DOOR)
        self.record()
        self.patches("")

    def write(self, module: str, source: str) -> Path:
        """Write a module, as a package if it has or may have submodules."""
        stem = self.site.joinpath(*module.split("."))
        package = module in ("vllm", "torch") or module.endswith("model_executor")
        path = stem / "__init__.py" if package else stem.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    def record(self) -> None:
        """Record the fake release 1.0 as it is now; what is written afterwards has drifted."""
        symbols: dict[str, list[str] | None] = {}
        for module, source in SOURCES.items():
            for name in _names(ast.parse(source)):
                found = _fingerprint.of_symbol(self.site, module, name)
                symbols[f"{module}:{name}"] = found and [found.signature, found.digest]
        data = {"vllm": {"1.0": {"source": {}, "symbols": symbols}}}
        (self.site / "records.json").write_text(json.dumps(data))

    def patches(self, text: str) -> None:
        """Declare the patches, as Python source: `patch("demo", target("vllm.ops:f")), ...`."""
        self.write("fakepatches", PATCHES % text)

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of a process with the door open and every patch selected."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "PYTHON"))}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join((str(self.site), str(REPOSITORY))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FAKE_DOOR": "open",
            "ASCEND_PATCHES": "all",
            "ASCEND_PATCHES_STATUS_DIR": str(self.status),
            **more,
        }

    def run(self, script: str, *arguments: str, fails: bool = False, **environment: str) -> Outcome:
        """Run a script in a process of its own.

        Args:
            script: Python source.
            arguments: Options of the interpreter.
            fails: Whether the shim is expected to report an error; if not, none is tolerated.
            environment: Variables to set.
        """
        path = self.folder / "script.py"
        path.write_text(script)
        done = subprocess.run(
            [sys.executable, *arguments, str(path)],
            env=self.environment(**environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=DEADLOCK_SECONDS,
        )
        if not fails:
            assert done.returncode == 0, done.stderr
            assert "failed" not in done.stderr, done.stderr
        states = [json.loads(p.read_text()) for p in sorted(self.status.rglob("*.json"))]
        return Outcome(done.returncode, done.stdout, done.stderr, states)


def _names(tree: ast.Module) -> list[str]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            found += [
                node.name,
                *(f"{node.name}.{f.name}" for f in node.body if hasattr(f, "name")),
            ]
    return found
