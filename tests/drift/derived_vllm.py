"""What each patch must come to on a release of vLLM, derived from the release's source alone.

A patch is applied where the source has what is wrong, retired where it no longer has, skipped where
there is nothing to change. Nothing of the registry, its data or its fingerprints is asked.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from release_tree import Tree, calls, words

LAYERS = "vllm.model_executor.layers"
MODELS = "vllm.model_executor.models"
ROPE = f"{LAYERS}.rotary_embedding"
BACKENDS = "vllm.v1.attention.backends"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
# The emulated device and GDN on a CPU are for one release: that of the CPU environments.
ON_CPUS = "0.18"


@dataclass(frozen=True)
class Derived:
    """What the source says.

    Attributes:
        state: applied, retired or skipped.
        why: The fact of the source that decides.
        places: What has to be changed, as `module:qualname`; None where the source does not say.
        modules: Where it has to be changed, where only that is known.
    """

    state: str
    why: str
    places: frozenset[str] | None = None
    modules: frozenset[str] = frozenset()


def applied(why: str, *places: str) -> Derived:
    return Derived("applied", why, frozenset(places))


# --- rotary -------------------------------------------------------------------------------------


def rounds_each_product(node: ast.AST) -> bool:
    """Whether cosines are brought to the model's dtype before they are multiplied."""
    return any(
        isinstance(call.args[0], ast.Attribute)
        and call.args[0].attr == "dtype"
        and "cos" in words(call.func)
        for call in calls(node, "to")
        if call.args
    )


def rotary(tree: Tree, release: str, device: str) -> Derived:
    one_class = tree.has(f"{ROPE}.common:ApplyRotaryEmb")
    arithmetic = tree.node(
        f"{ROPE}.common:"
        + ("ApplyRotaryEmb.forward_static" if one_class else "apply_rotary_emb_torch")
    )
    if arithmetic is None:
        return Derived("skipped", "its rotation is somewhere else")
    if not rounds_each_product(arithmetic):
        return Derived("retired", "it rotates in fp32")
    places = [f"{ROPE}.base:RotaryEmbedding.forward_native"]
    places.append(f"{ROPE}.mrope:MRotaryEmbedding.forward_native")
    places += [p for p in (f"{ROPE}.base:RotaryEmbedding.forward_cpu",) if tree.has(p)]
    kernel = tree.parameters(f"{ROPE}.mrope:triton_mrope")
    if not any("neox" in name for name in kernel):
        places.append(f"{ROPE}.mrope:MRotaryEmbedding.forward_cuda")
    places.append(
        f"{ROPE}.common:"
        + ("ApplyRotaryEmb.forward_native" if one_class else "apply_rotary_emb_dispatch")
    )
    vision = f"{MODELS}.qwen2_vl:apply_rotary_pos_emb_vision"
    # With (t, freqs) it computes its own cosines, in fp32.
    if tree.has(vision) and tree.parameters(vision) == ["t", "cos", "sin"]:
        places.append(vision)
    for layer in ("qwen3:Qwen3Attention", "qwen3_moe:Qwen3MoeAttention"):
        if {"q_norm", "k_norm", "rotary_emb"} <= tree.words(f"{MODELS}.{layer}.forward"):
            places.append(f"{MODELS}.{layer}.forward")
    return applied("it rounds every product to the model's dtype", *places)


# --- attention_router ---------------------------------------------------------------------------


def attention_router(tree: Tree, release: str, device: str) -> Derived:
    if device != "emulated":
        backend = tree.node(f"{BACKENDS}.flash_attn:FlashAttentionImpl")
        assert backend is not None
        # From 0.30 on the kernel has another name; what it is given has not.
        given = [
            {keyword.arg: keyword.value for keyword in call.keywords}
            for call in every_call(backend)
        ]
        right = any(
            {"causal", "window_size", "block_table"} <= set(keywords)
            and not isinstance(keywords["causal"], ast.Constant)
            for keywords in given
        )
        if right:
            return Derived("retired", "causality, window and cache go to the kernel as they are")
        return Derived("applied", "a case does not reach the kernel")
    place = "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls"
    if release != f"{ON_CPUS}.0":
        return Derived("skipped", f"the emulated device is for {ON_CPUS}.0")
    assert tree.parameters(place)[:3] == ["cls", "selected_backend", "attn_selector_config"]
    return applied("an NPU's path is emulated", place)


# --- gdn_attn -----------------------------------------------------------------------------------


def gdn_attn(tree: Tree, release: str, device: str) -> Derived:
    builder = f"{BACKENDS}.gdn_attn:GDNAttentionMetadataBuilder.build"
    if "chunk_indices" in tree.words(builder):
        return Derived("retired", "its builder makes the chunk tables")
    if device == "cuda":
        layers = (
            f"{LAYERS}.mamba.gdn_linear_attn:GatedDeltaNetAttention._forward_core",
            f"{MODELS}.qwen3_next:Qwen3NextGatedDeltaNet._forward_core",
            f"{MODELS}.qwen3_next:Qwen3NextGatedDeltaNet._forward",
        )
        core = next(place for place in layers if tree.has(place))
        places = [builder, core]
        # A prompt of one token is decode for it, and starts from what its slot holds.
        if "split_decodes_and_prefills" in tree.words(builder):
            places.append(builder.replace(".build", ".__init__"))
        return applied("its kernels derive the chunk tables on the device", *places)
    if device not in ("cpu", "emulated") or not release.startswith(f"{ON_CPUS}."):
        return Derived("skipped", f"on CPUs it is for {ON_CPUS}")
    places = [builder]
    places.append("vllm.platforms.cpu:CpuPlatform.check_and_update_config")
    places.append(f"{LAYERS}.utils:dispatch_cpu_unquantized_gemm")
    places.append(f"{MODELS}.qwen3_next:Qwen3NextGatedDeltaNet._forward_core")
    # A Triton kernel is launched there whatever the device is.
    for place in (
        "vllm.v1.worker.utils:KVBlockZeroer.zero_block_ids",
        "vllm.v1.worker.mamba_utils:batch_memcpy",
    ):
        node = tree.node(place)
        assert node is not None
        if any(isinstance(call.func, ast.Subscript) for call in every_call(node)):
            places.append(place)
    return applied("it has no kernels for a CPU", *places)


def every_call(node: ast.AST) -> list[ast.Call]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]


# --- kv_connector -------------------------------------------------------------------------------


def kv_connector(tree: Tree, release: str, device: str) -> Derived:
    early = f"{CONNECTOR}.v1.mooncake_connector"
    later = f"{CONNECTOR}.v1.mooncake.mooncake_connector"
    plan = f"{later}:_compute_sender_transfer_plan"
    if not tree.has(f"{early}:MooncakeConnectorWorker") and not tree.has(
        f"{later}:MooncakeConnectorWorker"
    ):
        return Derived("skipped", "it has no MooncakeConnector")
    if tree.has(f"{early}:MooncakeConnectorWorker"):
        # Rank r of decode asks rank r of prefill, however many there are.
        assert adds_its_rank(tree.module(early)), "it looks for its peer in another way"
        return Derived("applied", "it takes any two sizes for equal", None, frozenset({early}))
    if not tree.has(plan):
        assert refuses_other_sizes(tree.module(later)), "it neither refuses nor plans"
        return Derived("applied", "it refuses unequal sizes", None, frozenset({later}))
    if "total_num_kv_heads" in tree.parameters(plan):
        return Derived("retired", "its plan knows how many heads there are in all")
    return applied(
        "a head that several ranks hold is sent by one",
        plan,
        f"{later}:_validate_asymmetric_region_lengths",
    )


def adds_its_rank(module: ast.Module | None) -> bool:
    """Whether the peer's port is its side's port and the own rank."""
    assert module is not None
    return any(
        isinstance(node.op, ast.Add) and ast.unparse(node) == "meta.remote_port + self.tp_rank"
        for node in ast.walk(module)
        if isinstance(node, ast.BinOp)
    )


def refuses_other_sizes(module: ast.Module | None) -> bool:
    assert module is not None
    return any(
        isinstance(inner, ast.Constant) and "Heterogeneous TP is not supported" in str(inner.value)
        for raised in ast.walk(module)
        if isinstance(raised, ast.Raise)
        for inner in ast.walk(raised)
    )


PATCHES: dict[str, Callable[[Tree, str, str], Derived]] = {
    "attention_router": attention_router,
    "gdn_attn": gdn_attn,
    "kv_connector": kv_connector,
    "rotary": rotary,
}
