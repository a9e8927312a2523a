"""patch_rotary in vllm-ascend's classes and operators: what runs on an NPU.

Each target is one that some release has wrong, so VERIFY holds ours to the kernels' references.
"""

from __future__ import annotations

from ascend_patch._registry import NOTHING, REFERENCE, Band, Target

ASCEND = "vllm_ascend.ops.rotary_embedding"
ASCEND_TRITON = "vllm_ascend.ops.triton.rope"
ASCEND_REGISTRATION = "vllm_ascend.ops.register_custom_ops"
ASCEND_FUSED = "vllm_ascend.ops.triton.linearnorm"
ASCEND_IMPL = "ascend_patch.impl.rotary_ascend"


def _operator(name: str, replacement: str = "rope_forward_oot") -> Target:
    """The registered operator; its implementation has one body in every release that has it."""
    return Target(
        symbol=f"{ASCEND}:rope_forward_oot",
        seam="operator",
        operator=name,
        assigned_by=ASCEND_REGISTRATION,
        replacement=f"{ASCEND_IMPL}:{replacement}",
        oracle=REFERENCE,
        context=(
            f"{ASCEND_TRITON}:rope_forward_triton",
            f"{ASCEND_TRITON}:_triton_rope",
            f"{ASCEND_REGISTRATION}:<module>",
        ),
    )


def _fused(replacement: str) -> Target:
    """What the release's fusion pass puts in place of split, norms and rotation (Qwen3)."""
    module = f"{ASCEND_FUSED}.split_qkv_rmsnorm_rope"
    return Target(
        symbol=f"{module}:split_qkv_rmsnorm_rope_impl",
        seam="operator",
        operator="vllm::qkv_rmsnorm_rope",
        replacement=f"{ASCEND_IMPL}_fused:{replacement}",
        oracle=REFERENCE,
        context=(f"{module}:split_qkv_rmsnorm_rope_kernel", f"{module}:<module>"),
    )


def _fused_by_axis() -> Target:
    """The same with MRoPE, which Qwen3-VL's and Qwen3.5's attention call by name."""
    module = f"{ASCEND_FUSED}.split_qkv_rmsnorm_mrope"
    return Target(
        symbol=f"{module}:triton_split_qkv_rmsnorm_mrope",
        seam="operator",
        operator="vllm::triton_split_qkv_rmsnorm_mrope",
        replacement=f"{ASCEND_IMPL}_fused:split_qkv_rmsnorm_mrope",
        oracle=REFERENCE,
        context=(f"{module}:split_qkv_rmsnorm_mrope_kernel", f"{module}:<module>"),
    )


def _method(name: str, replacement: str, oracle: str = REFERENCE) -> Target:
    """A class's forward, which a compiled model traces."""
    return Target(
        symbol=f"{ASCEND}:{name}.forward_oot",
        seam="traced",
        replacement=f"{ASCEND_IMPL}_layers:{replacement}",
        oracle=oracle,
    )


def _built(name: str, replacement: str) -> Target:
    """A class's constructor, where a layer is told what its forward needs to know."""
    return Target(
        symbol=f"{ASCEND}:{name}.__init__",
        seam="host",
        replacement=f"{ASCEND_IMPL}{replacement}",
    )


MROPE = _method("AscendMRotaryEmbedding", "mrope")
# YaRN's class calls this one too. It may gather from other ranks; the operator in it is compared.
NO_KEY = _method("AscendRotaryEmbedding", "without_a_key", NOTHING)
GIVEN_ANGLES = _method("AscendApplyRotaryEmb", "apply_rotary_emb")
GIVEN_ANGLES_0_13 = _method("AscendApplyRotaryEmb", "apply_rotary_emb_0_13")
LAYERS = (NO_KEY, MROPE, GIVEN_ANGLES)
FUSED = (_fused("qkv_rmsnorm_rope"), _fused_by_axis())
TILED = _operator("vllm::npu_rotary_embedding", "rope_forward_oot_tiled")
YARN = _built("AscendYaRNRotaryEmbedding", "_layers:knows_its_method")

BANDS = (
    Band("vllm_ascend", "", ("0.23.0", "releases/v0.23.0"), (TILED, *FUSED, *LAYERS)),
    Band(
        "vllm_ascend",
        "",
        ("0.18.0", "releases/v0.18.0"),
        (_operator("vllm::npu_rotary_embedding"), *FUSED, *LAYERS, YARN),
    ),
    Band(
        "vllm_ascend",
        "",
        ("releases/v0.13.0",),
        (
            _operator("vllm::rope_forward_oot"),
            _fused("qkv_rmsnorm_rope_branch_0_13"),
            *(NO_KEY, MROPE, GIVEN_ANGLES_0_13),
        ),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.13.0",),
        (
            _fused("qkv_rmsnorm_rope_0_13"),
            *(MROPE, GIVEN_ANGLES_0_13),
            _built("AscendRotaryEmbedding", ":remember_whose_tables"),
            _built("AscendYaRNRotaryEmbedding", ":remember_whose_tables"),
            Target(
                symbol=f"{ASCEND}:_rope_forward_oot",
                seam="traced",
                replacement=f"{ASCEND_IMPL}:rope_forward_oot_0_13",
                oracle=REFERENCE,
                context=(
                    f"{ASCEND}:_record_cos_sin_cache",
                    f"{ASCEND}:update_cos_sin",
                    f"{ASCEND}:get_cos_and_sin_slice",
                    f"{ASCEND}:AscendRotaryEmbedding.forward_oot",
                ),
            ),
        ),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.11.0", "v0.11.0-dev"),
        (
            MROPE,
            Target(
                symbol=f"{ASCEND}:_rope_forward_oot",
                seam="traced",
                replacement=f"{ASCEND_IMPL}:rope_forward_oot_0_11",
                oracle=REFERENCE,
                context=(
                    f"{ASCEND}:_custom_rotary_embedding_enabled",
                    f"{ASCEND}:AscendRotaryEmbedding.forward_oot",
                ),
            ),
        ),
    ),
)
