"""The operator surface behind the real torch_npu: its live schemas, its Python names, our answers.

The wheel of torch_npu 2.13.0 over stubs of CANN; CPU tensors.
"""

from __future__ import annotations

import json

import pytest
from ascend_case import START
from environment import Environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def torch_npu() -> Environment:
    # Any of them: torch_npu and torch are the same in all.
    found = Environment("0.18.0")
    found.build()
    return found


def run(environment: Environment, code: str):
    """What the code prints last, as JSON."""
    opening = f"{START}\nimport json, numpy, torch, torch_npu"
    printed = environment.run(f"{opening}\n{code}", patches="none")
    found = json.loads(printed.strip().splitlines()[-1])
    print(found)
    return found


def test_every_recorded_schema_is_the_live_one(torch_npu):
    code = """
from ascend_patch.kernels.npu_ops import schemas, surface
def live(name):
    base, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, base.partition("::")[0]), base.partition("::")[2])
    return str(getattr(packet, overload or "default")._schema)
recorded = schemas.load("2.13.0")
differ = {name: [text, live(name)] for name, text in recorded.items() if live(name) != text}
installed = surface.install("2.13.0")
print(json.dumps([differ, sorted(installed.defined), sorted(installed.names), sorted(recorded)]))
"""
    differ, defined, names, recorded = run(torch_npu, code)
    assert differ == {}
    # Nothing is defined where torch_npu has it, and each operator has a CPU kernel.
    assert defined == []
    assert set(recorded) <= set(names)


def test_every_operator_gives_the_fp64_answer(torch_npu, seed):
    found = run(
        torch_npu, f"import real_operators\nprint(json.dumps(real_operators.measured({seed})))"
    )
    assert all(error <= 1 for error in found.values()), found
    ran = {name for names in found for name in names.split(" + ")}
    assert ran >= {
        "npu::npu_fused_infer_attention_score",
        "npu::npu_fused_infer_attention_score.out",
        "npu::npu_fused_infer_attention_score_v2",
        "npu::npu_fusion_attention",
        "atb::_npu_paged_attention",
        "atb::_npu_flash_attention",
        "atb::_npu_flash_attention_qlens",
        "atb::_npu_reshape_and_cache",
        "npu::npu_scatter_pa_kv_cache",
        "npu::npu_gather_pa_kv_cache",
        "atb::npu_paged_cache_load",
        "atb::npu_paged_cache_load.out",
        "npu::npu_rotary_mul",
        "npu::npu_mrope",
        "npu::npu_apply_rotary_pos_emb",
        "atb::_npu_rotary_embedding",
        "npu::npu_rms_norm",
        "npu::npu_add_rms_norm",
    }


def test_a_window_that_is_off_by_one_is_seen(torch_npu, seed):
    code = f"""
import real_operators
from real_oracle import Paged, ratio, start
start({seed})
batch = Paged([130, 0, 300], [5, 70, 1])
found = torch_npu.npu_fused_infer_attention_score(
    batch.query, *batch.flat(), num_heads=4, num_key_value_heads=2, input_layout="TND",
    scale=batch.scale, block_table=batch.table, block_size=128, sparse_mode=4, pre_tokens=63,
    next_tokens=0, actual_seq_lengths=batch.ends(), actual_seq_lengths_kv=batch.lengths,
    atten_mask=real_operators.mask(),
)[0]
print(json.dumps([ratio(found, batch.expected(window=window)) for window in (63, 64, 65)]))
"""
    narrow, right, wide = run(torch_npu, code)
    assert right <= 1
    assert min(narrow, wide) > 10


def test_our_own_calls_are_taken_and_right(torch_npu, seed):
    found, ran = run(
        torch_npu, f"import real_attention\nprint(json.dumps(real_attention.measured({seed})))"
    )
    assert len(found) == 45
    assert all(error <= 1 for error in found.values()), found
    assert set(ran) & {"npu::npu_fused_infer_attention_score", "npu::npu_fusion_attention"}


def test_what_an_npu_refuses_is_an_error_of_torch_npus_own_call(torch_npu):
    code = """
from ascend_patch.kernels.npu_ops import surface
surface.install("2.13.0")
said = []
def refused(function):
    try:
        function()
    except RuntimeError as error:
        said.append([type(error).__name__, str(error)])
    else:
        said.append(["", ""])
x, r = torch.ones(2, 5, 4, 16).half(), torch.ones(1, 5, 4, 16).half()
refused(lambda: torch_npu.npu_rotary_mul(x, r, r))
refused(lambda: torch_npu.npu_rotary_mul(x, r, r, "quarter"))
refused(lambda: torch_npu.npu_rms_norm(x, r[0, 0, 0].bfloat16()))
cache = torch.zeros(4, 16, 4, 16).half()
slots = torch.tensor([0, 64], dtype=torch.int32)
refused(lambda: torch_npu._npu_reshape_and_cache(x[:, 0], x[:, 0], cache, cache, slots))
refused(lambda: torch_npu.npu_fused_infer_attention_score(
    x.flatten(0, 1), x.flatten(0, 1), x.flatten(0, 1), num_heads=4, input_layout="TND", scale=1.0))
# The schema itself: an argument of another release.
refused(lambda: torch_npu.npu_rms_norm(x, r[0, 0, 0], eps=1e-5))
print(json.dumps(said))
"""
    said = run(torch_npu, code)
    assert [kind for kind, _ in said[:5]] == ["OperatorError"] * 5
    operators = [text.partition(":")[0] for _, text in said[:5]]
    assert operators == [
        "npu_rotary_mul",
        "npu_rotary_mul",
        "npu_rms_norm",
        "_npu_reshape_and_cache",
        "npu_fused_infer_attention_score",
    ]
    assert said[5][0] == "RuntimeError"
    assert "eps" in said[5][1]
