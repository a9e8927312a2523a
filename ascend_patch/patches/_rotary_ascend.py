"""patch_rotary in vllm-ascend's classes and operators: what runs on an NPU."""

from __future__ import annotations

from ascend_patch._registry import Band, Target

ASCEND = "vllm_ascend.ops.rotary_embedding"
ASCEND_TRITON = "vllm_ascend.ops.triton.rope"
ASCEND_REGISTRATION = "vllm_ascend.ops.register_custom_ops"
ASCEND_IMPL = "ascend_patch.impl.rotary_ascend"


def _ascend_operator(name: str) -> Target:
    """The registered operator; its implementation has one body in every release that has it."""
    return Target(
        symbol=f"{ASCEND}:rope_forward_oot",
        seam="operator",
        operator=name,
        assigned_by=ASCEND_REGISTRATION,
        replacement=f"{ASCEND_IMPL}:rope_forward_oot",
        context=(
            f"{ASCEND_TRITON}:rope_forward_triton",
            f"{ASCEND_TRITON}:_triton_rope",
            f"{ASCEND_REGISTRATION}:<module>",
        ),
    )


def _remembers_whose_tables(name: str) -> Target:
    """A class whose layers share the cos and sin that are gathered once a step."""
    return Target(
        symbol=f"{ASCEND}:{name}.__init__",
        seam="host",
        replacement=f"{ASCEND_IMPL}:remember_whose_tables",
    )


BANDS = (
    Band(
        host="vllm_ascend",
        versions="",
        releases=("0.18.0", "releases/v0.18.0", "0.23.0", "releases/v0.23.0"),
        targets=(_ascend_operator("vllm::npu_rotary_embedding"),),
    ),
    Band(
        host="vllm_ascend",
        versions="",
        releases=("releases/v0.13.0",),
        targets=(_ascend_operator("vllm::rope_forward_oot"),),
    ),
    Band(
        host="vllm_ascend",
        versions="",
        releases=("0.13.0",),
        targets=(
            _remembers_whose_tables("AscendRotaryEmbedding"),
            _remembers_whose_tables("AscendYaRNRotaryEmbedding"),
            Target(
                symbol=f"{ASCEND}:_rope_forward_oot",
                seam="traced",
                replacement=f"{ASCEND_IMPL}:rope_forward_oot_0_13",
                context=(
                    f"{ASCEND}:_record_cos_sin_cache",
                    f"{ASCEND}:update_cos_sin",
                    f"{ASCEND}:get_cos_and_sin_slice",
                    f"{ASCEND}:AscendRotaryEmbedding.forward_oot",
                ),
            ),
        ),
    ),
)
