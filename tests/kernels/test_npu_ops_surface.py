"""The surface itself: what it defines, what it leaves alone, what it notes, how it goes away."""

from __future__ import annotations

import sys
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.npu_ops import schemas, surface  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import (  # noqa: E402
    ALLOWANCES,
    allowed,
    cann_at_least,
    current,
    torch_npu_at_least,
)

if "torch_npu" in sys.modules:  # its schemas would stay; tests/ascend looks at that
    pytest.skip("needs: a process without torch_npu", allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_left():
    """Each test begins and ends without a surface."""
    for _ in range(2):
        found = surface.installed()
        if found is not None:
            found.remove()
        if _ == 0:
            yield


def attention(**options):
    query = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16)
    arguments = {"num_heads": 2, "input_layout": "BNSD", **options}
    return torch.ops.npu.npu_fused_infer_attention_score(query, query, query, **arguments)


@pytest.mark.parametrize("release", ["2.7.1", "2.8.0.post2", "2.9.0", "2.10.0", "2.9.1"])
def test_every_recorded_operator_is_there(release):
    found = surface.install(release)
    recorded = schemas.load(release)
    assert found.names == found.defined == set(recorded)
    for name, schema in recorded.items():
        namespace, _, rest = name.partition("::")
        short, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), short)
        assert str(getattr(packet, overload or "default")._schema) == schema


def test_removing_leaves_nothing():
    found = surface.install()
    assert attention()[0].shape == (1, 2, 3, 16)
    found.remove()
    assert surface.installed() is None
    assert not hasattr(torch.ops.npu, "npu_fused_infer_attention_score")
    assert current().release == "2.9.0"
    found.remove()
    surface.install()
    assert attention()[0].shape == (1, 2, 3, 16)


def test_installing_again_changes_the_settings():
    first = surface.install(strict=True, cann="9.1")
    assert current().strict
    again = surface.install(allow=("float32",), record=True)
    assert again is first is surface.installed()
    assert again.record
    assert not current().strict
    assert current().cann == "8.5"
    assert allowed("float32")


def test_another_release_has_other_schemas():
    surface.install("2.9.0")
    assert not hasattr(torch.ops.npu, "npu_gather_pa_kv_cache")
    second = surface.install("2.10.0")
    assert surface.installed() is second
    assert second.release == current().release == "2.10.0"
    assert hasattr(torch.ops.npu, "npu_gather_pa_kv_cache")


def test_too_old_a_release_is_refused():
    with pytest.raises(OperatorError, match=r"oldest recorded .* 2\.7\.1"):
        surface.install("2.6.0")
    assert surface.installed() is None


def test_calls_are_noted_under_the_schemas_names():
    """Every argument, positional ones and defaults too; tensors are the caller's own."""
    found = surface.install(record=True)
    query = torch.ones(2, 3, 16, dtype=torch.bfloat16)
    torch.ops.npu.npu_fusion_attention(
        query, query, query, 3, "TND", scale=0.5, actual_seq_qlen=[2], actual_seq_kvlen=[2]
    )
    (call,) = found.calls
    assert call.operator == "npu::npu_fusion_attention"
    names = [a.name for a in torch.ops.npu.npu_fusion_attention.default._schema.arguments]
    assert set(call.kwargs) == set(names)
    assert call.kwargs["head_num"] == 3
    assert call.kwargs["input_layout"] == "TND"
    assert call.kwargs["actual_seq_qlen"] == [2]
    assert call.kwargs["sparse_mode"] == 0
    assert call.kwargs["pre_tockens"] == 2147483647
    assert call.kwargs["query"].data_ptr() == query.data_ptr()
    with pytest.raises(OperatorError):
        attention(num_heads=3)
    assert [call.operator.partition("::")[2] for call in found.calls] == [
        "npu_fusion_attention",
        "npu_fused_infer_attention_score",
    ]
    surface.install(record=False)
    attention()
    assert len(found.calls) == 2


def test_an_operator_without_semantics_says_so():
    found = surface.install()
    without = found.names - set(surface.kernels())
    assert "atb::_npu_paged_attention_splitfuse" in without
    x = torch.ones(1, 1)
    arguments = (x,) * 7 + (1, 1, 0.5, x)
    said = r"^_npu_paged_attention_splitfuse: the operator surface has its schema and no CPU"
    with pytest.raises(OperatorError, match=said):
        torch.ops.atb._npu_paged_attention_splitfuse(*arguments)


def test_an_argument_that_nobody_knows_is_refused_unless_it_is_the_default(monkeypatch):
    def function(input, gamma):
        return input + gamma, input

    monkeypatch.setattr(surface, "kernels", lambda: {"npu::npu_rms_norm": function})
    surface.install()
    x = torch.ones(2)
    assert torch.equal(torch.ops.npu.npu_rms_norm(x, x)[0], x + x)
    assert torch.equal(torch.ops.npu.npu_rms_norm(x, x, 1e-6)[0], x + x)
    with pytest.raises(OperatorError, match=r"^npu_rms_norm: epsilon=0\.5 is not emulated"):
        torch.ops.npu.npu_rms_norm(x, x, 0.5)


def test_schemas_that_are_there_stay():
    """As where torch_npu has been imported: only a CPU kernel is added, and taken away again."""
    theirs = torch.library.Library("npu", "FRAGMENT")
    arguments = "Tensor input, Tensor gamma, float epsilon=0.25, int newer=3"
    schema = f"npu_rms_norm({arguments}) -> (Tensor, Tensor)"
    theirs.define(schema)
    try:
        found = surface.install()
        assert "npu::npu_rms_norm" in found.names - found.defined
        operator = torch.ops.npu.npu_rms_norm
        assert str(operator.default._schema) == f"npu::{schema}"
        x = torch.full((1, 16), 2.0, dtype=torch.float32)
        expected = 2 / (4 + 0.25) ** 0.5
        assert operator(x, torch.ones(16))[0][0, 0] == pytest.approx(expected, rel=1e-6)
        with pytest.raises(OperatorError, match="newer=4 is not emulated"):
            operator(x, torch.ones(16), newer=4)
        found.remove()
        assert str(torch.ops.npu.npu_rms_norm.default._schema) == f"npu::{schema}"
        with pytest.raises(NotImplementedError):
            torch.ops.npu.npu_rms_norm(x, torch.ones(16))
    finally:
        theirs._destroy()


def test_settings_are_a_threads_own():
    surface.install(cann="8.5")
    seen = {}

    def look():
        seen["other"] = current()
        with surface.settings(strict=True, forbid=("shared_blocks",)):
            seen["inside"] = current()

    with surface.settings(strict=True, cann="9.1", release="2.10.0", allow=("float32",)):
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert cann_at_least("9.1")
        assert torch_npu_at_least("2.10.0")
        assert allowed("float32")
        assert not allowed("tnd_head_size")
        with surface.settings(forbid=("float32",), allow=("tnd_head_size",)):
            assert not allowed("float32")
            assert allowed("tnd_head_size")
            assert current().cann == "9.1"
        assert allowed("float32")
    assert seen["other"].cann == "8.5"
    assert not seen["other"].strict
    assert seen["inside"].strict
    assert seen["inside"].cann == "8.5"
    assert not cann_at_least("9.0")


def test_settings_are_put_back_after_an_error():
    with pytest.raises(ValueError, match="mine"), surface.settings(strict=True):
        raise ValueError("mine")
    assert not current().strict


@pytest.mark.parametrize("name", sorted(ALLOWANCES))
def test_each_allowance_can_be_switched(name):
    by_default, sentence = ALLOWANCES[name]
    assert sentence
    assert allowed(name) == by_default
    with surface.settings(strict=True):
        assert not allowed(name)
        with surface.settings(allow=(name,)):
            assert allowed(name)
    with surface.settings(forbid=(name,)):
        assert not allowed(name)


def test_an_allowance_that_does_not_exist_is_an_error():
    with pytest.raises(KeyError, match="no_such"), surface.settings(allow=("no_such",)):
        pass
    with pytest.raises(KeyError, match="no_such"):
        surface.install(allow=("no_such",))
    assert surface.installed() is None


def test_strict_and_allow_reach_the_operators():
    query = torch.ones(3, 4, 64)
    options = {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "TND",
        "actual_seq_lengths": [3],
        "actual_seq_lengths_kv": [3],
    }
    call = torch.ops.npu
    surface.install(allow=("float32",))
    for _ in range(2):
        out, _ = call.npu_fused_infer_attention_score(query, query[:, :2], query[:, :2], **options)
        assert out.dtype == torch.float32
        surface.install(strict=True, allow=("float32", "tnd_head_size", "strided_kv"))
    surface.install(strict=True, allow=("float32", "strided_kv"))
    with pytest.raises(OperatorError, match="head size 64"):
        call.npu_fused_infer_attention_score(query, query[:, :2], query[:, :2], **options)


def test_calls_in_inference_mode():
    surface.install()
    with torch.inference_mode():
        out = attention()[0]
        target = torch.empty_like(out)
        query = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16)
        torch.ops.npu.npu_fused_infer_attention_score.out(
            query, query, query, num_heads=2, input_layout="BNSD", out=[target, torch.empty(1)]
        )
    assert torch.equal(out, target)
