"""The GDN layer's class of one vLLM release, patched: which steps are ours, and what they give.

    python gdn_layers.py ROOT RELEASE SEED

ROOT holds `vllm`, which is imported as it is. The layer is an instance of the release's class with
what its method reads; `_forward_core` (0.11.0: `_forward`) is the band's own target. The release's
own needs a GPU: what stands for it notes that it was called. On a CPU the kernels are their
references. Prints JSON: by check, an error relative to fp64 or who ran.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT, RELEASE, SEED = sys.argv[1:4]
sys.path.insert(0, ROOT)
CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(str(CHECKOUT))

import torch  # noqa: E402
from gdn_core_requests import Sizes, World, joined, metadata_of  # noqa: E402
from vllm import triton_utils  # noqa: E402

if not triton_utils.HAS_TRITON:
    # 0.11's placeholder lacks what its kernels name when they are imported.
    for name in ("exp", "log", "log2"):
        setattr(triton_utils.tl, name, getattr(triton_utils.tl, name, None))

from vllm.forward_context import override_forward_context  # noqa: E402

from ascend_patch import _plan, _registry  # noqa: E402
from ascend_patch._registry import Symbol  # noqa: E402
from ascend_patch._seams import make  # noqa: E402
from ascend_patch._versions import Installed  # noqa: E402
from ascend_patch.impl import gdn_metadata, gdn_vllm_trial, left_to_host  # noqa: E402

VERSION = tuple(map(int, RELEASE.split(".")))
PREFIX = "model.layers.0.linear_attn"
DRAFTS = 2


def declared() -> tuple[_registry.Target, type]:
    """The layer's target of the band that this release is in, and the class."""
    installed = Installed({"vllm": RELEASE}, {"vllm": Path(ROOT)}, "vllm", device="cuda")
    decision = _plan.decide(_registry.load()["gdn_attn"], installed)
    assert decision.band is not None, decision.reason
    (target,) = (t for t in decision.band.targets if "_forward" in t.symbol)
    symbol = Symbol.parse(target.symbol)
    owner = importlib.import_module(symbol.module)
    return target, getattr(owner, symbol.qualname.partition(".")[0])


def layer_of(cls: type, world: World):
    """An instance of the release's class, with the world's parameters and caches."""
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    sizes = world.sizes
    fields = {
        **vars(world.layer),
        "prefix": PREFIX,
        "tp_size": 1,
        "num_k_heads": sizes.key_heads,
        "num_v_heads": sizes.value_heads,
        "head_k_dim": sizes.key_size,
        "head_v_dim": sizes.value_size,
        "key_dim": sizes.key_heads * sizes.key_size,
        "value_dim": sizes.value_heads * sizes.value_size,
        "conv_kernel_size": sizes.kernel,
        "num_spec": sizes.drafts,
        "model_config": SimpleNamespace(dtype=torch.float32),
        "cache_config": SimpleNamespace(
            mamba_cache_dtype="auto", mamba_ssm_cache_dtype="float32", cache_dtype="auto"
        ),
    }
    for name, value in fields.items():
        object.__setattr__(layer, name, value)
    caches = (world.conv_cache, world.states)
    object.__setattr__(layer, "kv_cache", caches if VERSION >= (0, 19) else [caches])
    return layer


def layout_of(layer) -> str:
    """How the release's own calculator orders a state, K and V being different."""
    _, state = layer.get_state_shape()
    return {(layer.head_v_dim, layer.head_k_dim): "VK", (layer.head_k_dim, layer.head_v_dim): "KV"}[
        tuple(state[1:])
    ]


class Run:
    """Steps through the patched method, in a forward context of the release's own."""

    def __init__(self, cls: type, world: World) -> None:
        self.world, self.layer = world, layer_of(cls, world)
        self.theirs = 0

    def call(self, metadata, mixed, b, a, out) -> str:
        """Who ran: `ours` or `theirs`."""
        before = self.theirs
        context = SimpleNamespace(
            attn_metadata=None if metadata is None else {PREFIX: metadata},
            virtual_engine=0,
            no_compile_layers={PREFIX: self.layer},
        )
        with override_forward_context(context):
            self.layer._forward_core(mixed_qkv=mixed, b=b, a=a, core_attn_out=out)
        return "ours" if self.theirs == before else "theirs"

    def step(self, turns, *, tables: bool = True) -> tuple[str, float]:
        """Who ran a step, and how far it is from fp64, by the largest."""
        new = joined([turn.new for turn in turns])
        sizes = self.world.sizes
        out = torch.full((len(new) + 3, sizes.value_heads, sizes.value_size), torch.nan)
        metadata = metadata_of(turns)
        if not tables:
            setattr(metadata, gdn_metadata.ATTRIBUTE, None)
        who = self.call(metadata, new.mixed, new.b, new.a, out)
        expected = torch.cat([turn.expected for turn in turns])
        error = (out[: len(new)].double() - expected).abs().max() / expected.abs().max()
        return who, float(error)


class Whole(Run):
    """0.11.0: the projections are in the method; here they give exactly the tokens asked for."""

    def call(self, metadata, mixed, b, a, out) -> str:
        sizes, layer = self.world.sizes, self.layer
        tokens = len(mixed)
        group = sizes.value_heads // sizes.key_heads
        keys = sizes.key_heads * sizes.key_size
        q, k, v = mixed.split((keys, keys, sizes.value_heads * sizes.value_size), 1)
        q, k = (x.view(tokens, sizes.key_heads, sizes.key_size) for x in (q, k))
        v = v.view(tokens, sizes.key_heads, group * sizes.value_size)
        z = self.world.normal(tokens, sizes.key_heads, group * sizes.value_size)
        by_head = torch.cat((q, k, v, z), -1).flatten(1)
        gates = [x.view(tokens, sizes.key_heads, group) for x in (b, a)]
        ba = torch.cat(gates, -1).flatten(1)
        marked = torch.arange(tokens + 3.0)[:, None]
        object.__setattr__(layer, "in_proj_qkvz", lambda x: (by_head[x[:, 0].long()], None))
        object.__setattr__(layer, "in_proj_ba", lambda x: (ba[x[:, 0].long()], None))
        object.__setattr__(layer, "norm", lambda x, gate: x + gate)
        object.__setattr__(layer, "out_proj", lambda x: (x, None))
        before = self.theirs
        context = SimpleNamespace(
            attn_metadata=None if metadata is None else {PREFIX: metadata}, virtual_engine=0
        )
        flat = out.view(len(out), -1)
        with override_forward_context(context):
            layer._forward(marked, flat)
        if self.theirs == before:
            flat[:tokens] -= z.flatten(1)
        return "ours" if self.theirs == before else "theirs"


def main() -> None:
    """Run every check with the target installed over what stands for the release's method."""
    target, cls = declared()
    method = Symbol.parse(target.symbol).qualname.rpartition(".")[2]
    seed = int(SEED)
    sizes = Sizes(drafts=DRAFTS)
    probe = layer_of(cls, World(sizes, seed))
    layout = layout_of(probe)
    world = World(Sizes(drafts=DRAFTS, layout=layout), seed)
    run = (Whole if method == "_forward" else Run)(cls, world)

    def theirs(self, *args, **kwargs) -> None:
        run.theirs += 1

    setattr(cls, method, theirs)
    installation = make(target, lambda: None)
    installation.prepare()
    installation.install()
    found: dict[str, object] = {"layout": layout}
    requests = [world.request() for _ in range(3)]
    turns = [r.takes(n) for r, n in zip(requests, (65, 1, 4), strict=True)]

    # There is no Triton here: the kernels refuse before anything is written.
    caches = world.conv_cache.clone(), world.states.clone()
    found["without kernels"] = run.step(turns)[0]
    same = zip(caches, (world.conv_cache, world.states), strict=True)
    # They are full of NaN, which equals nothing.
    found["caches untouched"] = all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in same)
    found["notes"] = sorted(reason for _, reason in left_to_host._counters)

    gdn_vllm_trial.KERNELS = "reference"
    gdn_vllm_trial._tried.cache_clear()
    gdn_vllm_trial._verdicts.clear()
    found["without tables"] = run.step(turns, tables=False)[0]
    new = turns[0].new
    drawn = torch.get_rng_state()
    found["profile"] = run.call(None, new.mixed, new.b, new.a, torch.empty(len(new), 4, 128))
    found["draws nothing"] = torch.equal(drawn, torch.get_rng_state())
    found["compiled by the profile run"] = gdn_vllm_trial._tried.cache_info().currsize
    who, error = run.step(turns)
    found["prompts"] = {"who": who, "error": error}
    found["compiled by then"] = gdn_vllm_trial._tried.cache_info().currsize
    for turn in turns:
        turn.keep(len(turn.new))
    turns = [requests[0].takes(3, drafts=True), requests[1].takes(70), requests[2].takes(1)]
    who, error = run.step(turns)
    found["drafts beside prompts"] = {"who": who, "error": error}

    operators = sys.modules[cls.__module__]
    if hasattr(operators, "ChunkGatedDeltaRule"):
        chosen = operators.ChunkGatedDeltaRule
        for name in ("forward_native", "forward_cuda"):
            operator = SimpleNamespace(_forward_method=getattr(chosen, name).__get__(object()))
            object.__setattr__(run.layer, "chunk_gated_delta_rule", operator)
            found[name] = run.step(turns)[0]
    installation.revert()
    assert vars(cls)[method] is theirs
    print(json.dumps(found))


if __name__ == "__main__":
    main()
