"""vllm-ascend's own fusion pass over Qwen3's attention: it finds with us what it finds without us.

The pass, its patterns, the rotary class and the fused kernel are the release's. Later releases also
register the patterns with npugraph_ex (torchair before), whose own pass is run as well; both are
torch_npu's.
"""

from __future__ import annotations

import pytest
from ascend_case import Host, run

pytestmark = pytest.mark.slow

FUSION = """
import importlib, types
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
import vllm.forward_context
import vllm.model_executor.custom_op as custom_op
from vllm.config import VllmConfig, set_current_vllm_config
import vllm_ascend.ops.register_custom_ops, vllm_ascend.ops
import vllm_ascend.ops.rotary_embedding as module
import vllm_ascend.ops.triton.triton_utils as triton_utils
import vllm_ascend.compilation.passes.qknorm_rope_fusion_pass as fusion
triton_utils._NUM_VECTORCORE = 40
HEADS, KV_HEADS, SIZE, EPS, ROWS, TOKENS = 4, 2, 128, 1e-6, 64, 9
BF16 = torch.bfloat16

library = torch.library.Library("vllm", "IMPL")
for name in ("qkv_rmsnorm_rope", "npu_rotary_embedding"):
    if hasattr(torch.ops.vllm, name):
        operator = getattr(torch.ops.vllm, name).default
        library.impl(name, functools.partial(operator.redispatch, NPU), "CPU")

class OnCpu(TorchFunctionMode):
    "The patterns' example inputs are made on an NPU; here they are on the CPU."
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "npu":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

config = VllmConfig()
config.model_config = types.SimpleNamespace(
    dtype=BF16, use_mla=False, get_head_size=lambda: SIZE, hf_text_config=object())
attention = object.__new__(fusion.Attention)
attention.__dict__.update(head_size=SIZE, num_heads=HEADS, num_kv_heads=KV_HEADS)
config.compilation_config.static_forward_context = {"attention": attention}
def registered():
    return 0 if graph_patterns is None else sum(map(len, graph_patterns.patterns.values()))

graph_patterns = None
if hasattr(fusion, "BasePattern"):
    base = importlib.import_module(fusion.BasePattern.__module__)
    nge = vars(base).get("nge") or base.torchair
    # Its package is found under two names, each with a manager of its own.
    manager = sys.modules[nge.register_replacement.__module__]
    graph_patterns = manager._pattern_manager().pass_dict
before = registered()
with OnCpu():
    the_pass = fusion.QKNormRopeFusionPass(config)

context = types.SimpleNamespace(is_draft_model=False, flash_comm_v1_enabled=False)
vllm.forward_context._forward_context = context
custom_op.CustomOp.dispatch_forward = lambda self, *_, **__: self.forward_oot

def layer(base, neox=True, size=SIZE):
    config = VllmConfig()
    with set_current_vllm_config(config):
        return module.AscendRotaryEmbedding(size, size, ROWS, base, neox, BF16)

def randn(*shape, offset=0):
    generator = torch.Generator().manual_seed(SEED + offset)
    return torch.randn(*shape, generator=generator).to(BF16)

MAIN, OTHER, STYLE = layer(10000.0), layer(1000000.0), layer(10000.0, neox=False)
POSITIONS = torch.randint(0, ROWS, (TOKENS,), generator=torch.Generator().manual_seed(SEED))
QKV = randn(TOKENS, (HEADS + 2 * KV_HEADS) * SIZE)
WEIGHTS = 1 + randn(SIZE, offset=1) / 8, 1 + randn(SIZE, offset=2) / 8
module._cos, module._sin = (torch.zeros(1, 16, 1, SIZE, dtype=BF16) for _ in "cs")
module.update_cos_sin(POSITIONS)

def block(rotary, positions, qkv, q_weight, k_weight):
    "The part of Qwen3's attention that comes before attention."
    q, k, v = qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
    q_by_head = q.view(*q.shape[:-1], q.shape[-1] // SIZE, SIZE)
    q_by_head, _ = torch_npu.npu_rms_norm(q_by_head, q_weight, EPS)
    k_by_head = k.view(*k.shape[:-1], k.shape[-1] // SIZE, SIZE)
    k_by_head, _ = torch_npu.npu_rms_norm(k_by_head, k_weight, EPS)
    q, k = rotary.forward_oot(positions, q_by_head.view(q.shape), k_by_head.view(k.shape))
    return q, k, v

def by_pass(graph):
    the_pass(graph)
    return the_pass.matched_count

def fused(rotary, apply=by_pass):
    "How often a pass matched in a block's graph, and how far the fused block is from it."
    matched = []

    def compiler(graph_module, _inputs):
        matched.append(apply(graph_module.graph))
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module.forward

    torch.compiler.reset()
    compiled = torch.compile(
        block, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    call = rotary, POSITIONS, QKV, *WEIGHTS
    with torch.no_grad():
        eager, ours = block(*call), compiled(*call)
    apart = max(float((x.float() - y.float().view(x.shape)).abs().max())
                for x, y in zip(eager, ours))
    return [matched, apart]

patterns = sum(map(len, the_pass.pattern_match_passes.patterns.values()))
counts = {name: fused(rotary) for name, rotary in (("main", MAIN), ("GPT-J", STYLE))}
counts["other"] = fused(OTHER)
if graph_patterns is not None:
    counts["npugraph_ex"] = fused(MAIN, graph_patterns.apply)
print(json.dumps([patterns, registered() - before, counts, rotary()["state"], calls()]))
"""


@pytest.fixture(scope="module", params=["0.13.0", "0.18.0", "0.23.0"])
def ascend(request) -> Host:
    return Host(request.param)


def test_the_passes_match_the_same_with_and_without_us(ascend, seed):
    patterns, registered, release, _, _ = run(ascend, seed, FUSION, patches="none")
    # With and without biases, for two epsilons.
    assert patterns == 4
    assert registered == (0 if ascend.release == "0.13.0" else 4)
    expected = {"main": [1], "GPT-J": [0], "other": [1]}
    if registered:
        expected["npugraph_ex"] = [1]
    assert {name: matched for name, (matched, _) in release.items()} == expected
    # Fused, the release rounds once more, or once less.
    assert all(apart < 0.1 for _, apart in release.values()), release
    again, ours_registered, ours, state, calls = run(ascend, seed, FUSION, patches="all")
    assert (again, ours_registered, state) == (patterns, registered, "applied")
    if ascend.release == "0.13.0":
        # Its pattern has one table for all layers: a layer with its own is not fused, and right.
        expected["other"] = [0]
    assert {name: matched for name, (matched, _) in ours.items()} == expected
    assert ours["main"] == release["main"]
    assert calls["qkv_rmsnorm_rope"] >= 1
