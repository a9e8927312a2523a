"""Which layers of a CPU server the emulated device takes, and what its log says of the others."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm", reason="vLLM is not installed here")

from ascend_patch import _bootstrap, _registry, _versions
from ascend_patch._registry import Band
from ascend_patch._seams import make
from ascend_patch.impl import attention_vllm
from ascend_patch.kernels import dispatch
from ascend_patch.kernels.npu_ops import settings, surface

if _versions.find().versions["vllm"].partition("+")[0] != "0.18.0":
    pytest.skip("the emulated device is for vLLM 0.18.0", allow_module_level=True)

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

THEIRS = AttentionBackendEnum.CPU_ATTN.get_path()
OURS = attention_vllm.BACKEND


@pytest.fixture
def said(monkeypatch):
    """What was said so far; what this process has begun is forgotten before and after."""
    lines: list[str] = []
    monkeypatch.setattr(_bootstrap, "complain", lines.append)

    def forget() -> None:
        attention_vllm.begin.cache_clear()
        attention_vllm._say.cache_clear()
        found = surface.installed()
        if found is not None:
            found.remove()
        AttentionBackendEnum.CUSTOM.clear_override()

    forget()
    yield lines
    forget()


def emulated() -> Band:
    patch = _registry.load()["attention_router"]
    return next(band for band in patch.bands if band.devices == ("emulated",))


@pytest.fixture
def choose(said):
    """vLLM's own question, with the patch applied to its class."""
    (target,) = emulated().targets
    calls = []
    installation = make(target, lambda: calls.append(1))
    installation.prepare()
    installation.install()

    def choose(selected=None, **more) -> str:
        given = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto"}
        config = AttentionSelectorConfig(**{**given, "block_size": None, **more})
        found = CpuPlatform.get_attn_backend_cls(selected, attn_selector_config=config)
        assert calls
        return found

    yield choose
    installation.revert()
    plain = AttentionSelectorConfig(128, torch.bfloat16, "auto", None)
    assert CpuPlatform.get_attn_backend_cls(None, plain) == THEIRS


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoder_layers_take_the_npu_s_path(choose, said, head_size, dtype):
    assert choose(head_size=head_size, dtype=dtype) == OURS
    assert AttentionBackendEnum.CUSTOM.get_path() == OURS
    assert not settings.allowed("float32")
    (line,) = said
    assert "operator surface of torch_npu 2.9.0 and CANN 8.5" in line


def test_the_class_is_what_its_path_and_its_name_lead_to(choose):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    found = resolve_obj_by_qualname(choose())
    assert AttentionBackendEnum[found.get_name()].get_class() is found


def test_float32_needs_an_allowance_and_the_log_says_so(choose, said):
    assert choose(dtype=torch.float32) == OURS
    assert choose(dtype=torch.float32, head_size=64) == OURS
    assert choose() == OURS
    assert settings.allowed("float32")
    assert len(said) == 2
    assert "`float32` is on" in said[1]


@pytest.mark.parametrize("attn_type", ["encoder_only", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("kind", [AttentionType, str])
def test_layers_that_are_no_decoder_s_stay_with_vllm(choose, said, attn_type, kind):
    assert choose(attn_type=kind(attn_type)) == THEIRS
    assert f"because {attn_type} attention is vLLM's" in said[0]
    assert surface.installed() is None


def test_vllm_names_a_decoder_by_a_member_of_its_enumeration(choose):
    assert choose(attn_type=AttentionType.DECODER) == OURS


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"head_size": 32}, "A head has 32 elements"),
        ({"head_size": 80}, "A head has 80 elements"),
        ({"kv_cache_dtype": "fp8"}, "The cache holds fp8"),
        ({"block_size": 64}, "--block-size 64 is no multiple of 128"),
        ({"use_mm_prefix": True}, "in both directions"),
        ({"selected": AttentionBackendEnum.CPU_ATTN}, "CPU_ATTN was asked for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_operator_takes_stays_with_vllm_and_the_log_says_why(choose, said, given, reason):
    assert choose(**given) == THEIRS
    assert choose(**given) == THEIRS
    (line,) = said
    assert line.startswith("emulated device: vLLM's own CPU attention runs, because ")
    assert reason in line


@pytest.mark.parametrize("kind", ["use_mla", "use_sparse"])
def test_what_vllm_refuses_it_refuses_itself(choose, kind):
    with pytest.raises(NotImplementedError, match="not supported on CPU"):
        choose(**{kind: True})


def test_the_operators_that_run_are_counted(choose):
    choose()
    seen: list[str] = []
    before = dispatch.set_observer(seen.append)
    try:
        cache = torch.zeros(2, 2, 128, 2, 64, dtype=torch.bfloat16)
        key = torch.ones(3, 2, 64, dtype=torch.bfloat16)
        slots = torch.tensor([1, 2, -1], dtype=torch.int32)
        torch.ops.atb._npu_reshape_and_cache(key, key, *cache.unbind(0), slots)
    finally:
        dispatch.set_observer(before)
    assert seen == ["atb::_npu_reshape_and_cache"]
    assert cache.sum() == 2 * 2 * key[0].sum()
