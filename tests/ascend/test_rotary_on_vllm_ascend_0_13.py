"""patch_rotary on vllm-ascend 0.13.0: a draft model rotates by its own angles."""

from __future__ import annotations

import json

import pytest
from environment import Environment

pytestmark = pytest.mark.slow

# torch_npu's two operators behind the release's code, in float32 on CPU tensors; `used` records
# which of them ran. The layers are made as the release makes them, main model first.
START = """
import json, numpy, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import vllm_ascend.ops.rotary_embedding as module
used = []

def apply_rotary_pos_emb(q, k, cos, sin):
    used.append("npu_apply_rotary_pos_emb")
    def turn(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return turn(q), turn(k)

def npu_rotary_embedding(positions, q, k, size, cache, neox):
    used.append("_npu_rotary_embedding")
    cos, sin = (t[:, None] for t in cache[positions].chunk(2, -1))
    for x in (q, k):
        view = x.view(x.shape[0], -1, size)
        first, second = (t.clone() for t in view.chunk(2, -1))
        view.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))

torch_npu.npu_apply_rotary_pos_emb = apply_rotary_pos_emb
torch_npu._npu_rotary_embedding = npu_rotary_embedding
import vllm.model_executor.custom_op as custom_op
custom_op.CustomOp.dispatch_forward = lambda self, *_, **__: self.forward_oot

def layer(base, head_size=128):
    return module.AscendRotaryEmbedding(head_size, head_size, 64, base, True, torch.float32)

MAIN, DRAFT = layer(10000.0), layer(1000000.0)
POSITIONS = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(SEED))
module._cos, module._sin = torch.ones(1, 16, 1, 128), torch.zeros(1, 16, 1, 128)
module.update_cos_sin(POSITIONS)

def error(layer, base, head_size=128):
    'The largest error of a layer against complex rotation in float64.'
    generator = torch.Generator().manual_seed(SEED + 1)
    q = torch.randn(9, 4 * head_size, generator=generator)
    k = torch.randn(9, 2 * head_size, generator=generator)
    expected = []
    angles = POSITIONS.numpy()[:, None] / base ** (numpy.arange(0, head_size, 2) / head_size)
    for x in (q, k):
        x = x.double().numpy().reshape(9, -1, head_size)
        half = head_size // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * numpy.exp(1j * angles)[:, None]
        expected.append(numpy.concatenate([turned.real, turned.imag], -1))
    got = layer.forward_oot(POSITIONS, q.clone(), k.clone())
    return max(
        float(numpy.abs(g.double().numpy().reshape(e.shape) - e).max())
        for g, e in zip(got, expected))
"""


@pytest.fixture(scope="module")
def ascend() -> Environment:
    environment = Environment("0.13.0")
    environment.build()
    return environment


def run(ascend: Environment, seed: int, code: str, *, patches: str) -> object:
    source = f"SEED = {seed}\n{START}\n{code}"
    return json.loads(ascend.run(source, patches=patches).strip().splitlines()[-1])


BOTH = """
main, draft = error(MAIN, 10000.0), error(DRAFT, 1000000.0)
print(json.dumps([main, draft, used]))
"""


def test_the_release_rotates_a_draft_model_by_the_main_model_s_angles(ascend, seed):
    main, draft, used = run(ascend, seed, BOTH, patches="none")
    assert main < 1e-4
    assert draft > 0.1
    assert used == ["npu_apply_rotary_pos_emb"] * 2


def test_patched_both_are_right_and_the_main_model_keeps_the_operator(ascend, seed):
    main, draft, used = run(ascend, seed, BOTH, patches="all")
    assert main < 1e-4
    assert draft < 1e-4
    assert used == ["npu_apply_rotary_pos_emb"]


def test_a_layer_that_shares_no_tables_stays_with_the_release(ascend, seed):
    code = """
small = layer(1000000.0, head_size=64)
print(json.dumps([error(small, 1000000.0, 64), used]))
"""
    found, used = run(ascend, seed, code, patches="all")
    assert found < 1e-4
    assert used == ["_npu_rotary_embedding"]


def test_all_targets_are_applied_and_revert_gives_them_back(ascend, seed):
    code = """
import ascend_patch
state = next(p for p in ascend_patch.status()["patches"] if p["id"] == "rotary")
patched = error(DRAFT, 1000000.0)
ascend_patch.revert("rotary")
states = {t["id"]: t["state"] for t in state["targets"]}
print(json.dumps([states, patched, error(DRAFT, 1000000.0)]))
"""
    states, patched, reverted = run(ascend, seed, code, patches="all")
    # Without Triton the release never imports its fused operator.
    assert states.pop("vllm::qkv_rmsnorm_rope") == "armed"
    assert list(states.values()) == ["applied"] * 5
    assert patched < 1e-4
    assert reverted > 0.1
