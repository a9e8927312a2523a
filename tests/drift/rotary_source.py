"""The rotary classes of an unpacked vLLM, executed without the rest of it, patched and not.

    python rotary_source.py ROOT RELEASE SEED

What they import of vLLM besides each other is stubbed: a CPU platform, a CustomOp that calls its
native form. With TRITON_INTERPRET=1 Triton is real, and forward_cuda runs too. Prints JSON: for
each check whether the release is within the oracle's bounds, and whether it is with patch_rotary's
targets in place.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "tests" / "kernels"), str(CHECKOUT)]

import rope_oracle as oracle  # noqa: E402

from ascend_patch import _plan, _registry  # noqa: E402
from ascend_patch._seams import make  # noqa: E402
from ascend_patch._versions import Installed  # noqa: E402

ROPE = "vllm.model_executor.layers.rotary_embedding"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEAD_SIZE, ROWS, TOKENS = 64, 128, 65
AXES = {"chunked": ([8, 12, 12], False), "interleaved": ([12, 10, 10], True)}


class Anything:
    """Stands for what the classes import and, on a CPU, never use; decorates without a change."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: object, **_: object) -> object:
        return args[0] if args and isinstance(args[0], types.FunctionType) else Anything()

    def __bool__(self) -> bool:
        return False


class CustomOp(torch.nn.Module):
    """vLLM's, as far as rotary classes see it: registration, and a CPU that runs native forms."""

    def __init__(self, enforce_enable: bool = False, **_: object) -> None:
        super().__init__()

    @classmethod
    def register(cls, *_: object, **__: object) -> Callable[[type], type]:
        return lambda registered: registered

    @classmethod
    def enabled(cls) -> bool:
        return True

    def forward_cpu(self, *args: object, **kwargs: object) -> object:
        return self.forward_native(*args, **kwargs)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages of vLLM without their __init__, the rotary modules as they are, and stubs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name.partition(".")[0] != "vllm":
            return None
        if name.startswith(ROPE + "."):
            return importlib.machinery.PathFinder.find_spec(name, path)
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self.root.joinpath(*name.split(".")))]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(Anything(), name)
        if spec.name == "vllm.model_executor.custom_op":
            module.CustomOp = CustomOp
        if spec.name == "vllm.triton_utils" and INTERPRETED:
            module.triton, module.tl = (
                importlib.import_module(name) for name in ("triton", "triton.language")
            )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def within(judge: Callable[[], None]) -> bool:
    try:
        judge()
    except AssertionError:
        return False
    return True


class Checks:
    """Each check builds a layer, calls it on fresh inputs, and asks the oracle."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.base, self.mrope, self.common = (
            importlib.import_module(f"{ROPE}.{name}") for name in ("base", "mrope", "common")
        )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = torch.randn(TOKENS, 8 * HEAD_SIZE, generator=self.generator).bfloat16()
        query, key, _ = qkv.split([4 * HEAD_SIZE, 2 * HEAD_SIZE, 2 * HEAD_SIZE], dim=-1)
        return torch.randint(0, ROWS, (TOKENS,), generator=self.generator), query, key

    def plain(self, neox: bool, form: str) -> bool:
        options = HEAD_SIZE, HEAD_SIZE, ROWS, 10000.0, neox, torch.bfloat16
        layer = self.base.RotaryEmbedding(*options)
        return self.rotates(layer, form, *self.inputs())

    def sections(self, name: str, neox: bool, form: str, text: bool = False) -> bool:
        section, interleaved = AXES[name]
        options = HEAD_SIZE, HEAD_SIZE, ROWS // 4, 10000.0, neox, torch.bfloat16
        layer = self.mrope.MRotaryEmbedding(*options, section, interleaved)
        positions, query, key = self.inputs()
        if not text:
            positions = torch.stack((positions, positions.flip(0), positions // 2))
        return self.rotates(layer, form, positions, query, key)

    def rotates(self, layer, form, positions, query, key) -> bool:
        sections = getattr(layer, "mrope_section", None)
        interleaved = sections is not None and layer.mrope_interleaved
        phase = oracle.phases(positions, layer.cos_sin_cache, sections, interleaved)
        call = query.clone(), key.clone()
        results = getattr(layer, form)(positions, *call)
        return all(
            within(
                lambda got=got, x=x: oracle.assert_close(
                    got, oracle.rotate(x, phase, HEAD_SIZE, layer.is_neox_style)
                )
            )
            for got, x in zip(results, (query, key), strict=True)
        )

    def angles(self, neox: bool) -> bool:
        _, x, _ = self.inputs()
        x = x.reshape(TOKENS, 4, HEAD_SIZE)
        angle = torch.randn(TOKENS, HEAD_SIZE // 2, generator=self.generator)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        if hasattr(self.common, "ApplyRotaryEmb"):
            got = self.common.ApplyRotaryEmb(is_neox_style=neox).forward_cpu(x, cos, sin)
        else:
            # As the module of MRotaryEmbedding imported it, by name.
            got = self.mrope.apply_rotary_emb_dispatch(x, cos, sin, neox)
        phase = (cos.double() + 1j * sin.double()).numpy()
        return within(lambda: oracle.assert_close(got, oracle.rotate(x, phase, HEAD_SIZE, neox)))

    def run(self, *, cuda: bool) -> dict[str, bool]:
        """Every check by name; `cuda` also calls forward_cuda, whose original is Triton's."""
        found = {}
        for style, neox in (("neox", True), ("gptj", False)):
            found[f"plain {style}"] = self.plain(neox, "forward_native")
            found[f"angles {style}"] = self.angles(neox)
            for name in AXES:
                found[f"{name} {style}"] = self.sections(name, neox, "forward_cpu")
            found[f"text {style}"] = self.sections("chunked", neox, "forward_cpu", text=True)
        if cuda:
            for name in AXES:
                found[f"cuda {name} gptj"] = self.sections(name, False, "forward_cuda")
        if INTERPRETED:
            # NeoX pairs are the release's in any case; fp32 tells layout from rounding.
            found["cuda layout neox"], found["cuda layout gptj"] = (
                self.layout(neox) for neox in (True, False)
            )
        return found

    def layout(self, neox: bool) -> bool:
        """Whether forward_cuda rotates the pairs of the layer's style, however it rounds."""
        section, interleaved = AXES["chunked"]
        options = HEAD_SIZE, HEAD_SIZE, ROWS // 4, 10000.0, neox, torch.float32
        layer = self.mrope.MRotaryEmbedding(*options, section, interleaved)
        positions, query, _ = self.inputs()
        positions = torch.stack((positions, positions.flip(0), positions // 2))
        query = query.float().contiguous()
        phase = oracle.phases(positions, layer.cos_sin_cache, section, interleaved)
        expected = oracle.rotate(query, phase, HEAD_SIZE, neox).value
        got, _ = layer.forward_cuda(positions, query.clone(), query.clone())
        return bool(abs(got.double().numpy() - expected).max() < 1e-4)


def main(root: Path, release: str, seed: int) -> None:
    sys.meta_path.insert(0, Stubs(root))
    decision = _plan.decide(
        _registry.load()["rotary"], Installed({"vllm": release}, {"vllm": root}, "vllm")
    )
    assert decision.band is not None, decision.reason
    targets = [t for t in decision.band.targets if t.module.startswith(ROPE)]
    checks = Checks(seed)
    before = checks.run(cuda=INTERPRETED)
    installations = [make(target, lambda: None) for target in targets]
    for installation in installations:
        installation.prepare()
    for installation in installations:
        installation.install()
    symbols = [target.symbol.rpartition(":")[2] for target in targets]
    after = checks.run(cuda="MRotaryEmbedding.forward_cuda" in symbols)
    for installation in reversed(installations):
        installation.revert()
    again = checks.run(cuda=False)
    print(json.dumps({"before": before, "after": after, "again": again, "targets": symbols}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
