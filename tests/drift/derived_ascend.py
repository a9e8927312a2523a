"""What each patch must come to on a release or branch head of vllm-ascend, from its source alone.

As `derived_vllm`: applied where the source has what is wrong, skipped where nothing can be done or
nothing is left to do.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from derived_vllm import Derived, applied, every_call
from release_tree import Tree, calls, imports, words

ROPE = "vllm_ascend.ops.rotary_embedding"
ROPE_KERNEL = "vllm_ascend.ops.triton.rope:_triton_rope"
ATTENTION = "vllm_ascend.attention.attention_v1"
WORKER_PATCH = "vllm_ascend.patch.worker"
BUILDER = "vllm.v1.attention.backends.gdn_attn:GDNAttentionMetadataBuilder"


def registered(tree: Tree) -> dict[str, tuple[str, str, str]]:
    """Custom operators by name: where they are registered, their function, and the key."""
    found: dict[str, tuple[str, str, str]] = {}
    for module, source in tree.mentioning({"direct_register_custom_op"}):
        names = imports(module, source)
        for call in calls(source, "direct_register_custom_op"):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            name, function, key = (given.get(n) for n in ("op_name", "op_func", "dispatch_key"))
            if not isinstance(name, ast.Constant) or not isinstance(function, ast.Name):
                continue
            place = names.get(function.id, f"{module}:{function.id}")
            assert name.value not in found, f"{name.value} is registered twice"
            found[name.value] = module, place, ast.literal_eval(key) if key else ""
    return found


# --- rotary -------------------------------------------------------------------------------------


def sines_follow_the_padding(tree: Tree) -> bool:
    """Whether the kernel looks for sines behind the next power of two, not behind the cosines."""
    kernel = tree.node(ROPE_KERNEL)
    return kernel is not None and any(
        ast.unparse(call) == "tl.arange(pad_rope_dim // 2, pad_rope_dim)"
        for call in calls(kernel, "arange")
    )


def rotary(tree: Tree, vllm: Tree, release: str) -> Derived:
    operators = registered(tree)
    places, why = [], []
    plain = f"{ROPE}:AscendRotaryEmbedding"
    for name in ("npu_rotary_embedding", "rope_forward_oot"):
        if name in operators and sines_follow_the_padding(tree):
            places.append(operators[name][1])
            why.append("sines are read from a wrong offset")
            # An operator's schema has no optional key.
            if calls(tree.node(f"{plain}.forward_oot") or ast.Module([], []), name):
                places.append(f"{plain}.forward_oot")
    own = f"{ROPE}:_rope_forward_oot"
    if tree.has(own):
        places.append(own)
        if "get_cos_and_sin_slice" in tree.words(own):
            why.append("one table of angles for all models")
            places += [f"{plain}.__init__", f"{ROPE}:AscendYaRNRotaryEmbedding.__init__"]
        else:
            why.append("its operators round every product")
    for name in ("qkv_rmsnorm_rope", "triton_split_qkv_rmsnorm_mrope"):
        if name in operators:
            places.append(operators[name][1])
    sections = f"{ROPE}:AscendMRotaryEmbedding.forward_oot"
    if calls(tree.node(sections) or ast.Module([], []), "forward_oot"):
        places.append(sections)
    given = f"{ROPE}:AscendApplyRotaryEmb.forward_oot"
    if tree.has(given) and "is_neox_style" not in tree.words(given):
        places.append(given)
    # YaRN's class runs the other's forward, which reads what only the other's constructor sets.
    yarn = f"{ROPE}:AscendYaRNRotaryEmbedding"
    lent = {"use_mtp"} & tree.words(f"{plain}.forward_oot")
    if lent - tree.words(f"{yarn}.__init__"):
        places.append(f"{yarn}.__init__")
    return applied("; ".join(why), *places)


# --- attention_router ---------------------------------------------------------------------------


def attention_router(tree: Tree, vllm: Tree, release: str) -> Derived:
    base = f"{ATTENTION}:AscendAttentionBackendImpl"
    node = tree.node(base)
    assert node is not None
    # sliding_window counts the query's own token, pre_tokens does not.
    too_wide = [
        value
        for call in every_call(node)
        for value in (keyword.value for keyword in call.keywords if keyword.arg == "pre_tokens")
        if ast.unparse(value).startswith("self.sliding_window")
    ]
    if not too_wide:
        return Derived("retired", "its windows are as wide as they are meant")
    places = [f"{base}.forward"]
    int8 = f"{ATTENTION}:AscendC8AttentionBackendImpl.forward"
    return applied("its windows are one key too wide", *places, *([int8] if tree.has(int8) else []))


# --- gdn_attn -----------------------------------------------------------------------------------


def gdn_attn(tree: Tree, vllm: Tree, release: str) -> Derived:
    tables = "vllm_ascend.ops.gdn_attn_builder:_build_non_spec_chunked_prefill_metadata"
    if tree.has(tables):
        return applied("its builder makes the tables, sequences without tokens among them", tables)
    layer = f"{WORKER_PATCH}.patch_qwen3_next:AscendQwen3Next_GatedDeltaNet._forward_core"
    build = f"{WORKER_PATCH}.patch_gdn_attn:_patched_build"
    if tree.has(build):
        reads = f"{WORKER_PATCH}.patch_qwen3_5:to_int64_tuple"
        assert {"tolist", "cpu"} & tree.words(reads)
        other = f"{WORKER_PATCH}.patch_qwen3_5:AscendQwen3_5GatedDeltaNet._forward_core"
        blocks = "vllm_ascend.worker.block_table:BlockTable.__init__"
        begin = f"{BUILDER}.__init__"
        return applied("its layers read the device", build, blocks, reads, layer, other, begin)
    if tree.has(layer):
        # The builder is vLLM's own, and so is the mistake.
        assert "chunk_indices" not in vllm.words(f"{BUILDER}.build")
        return applied(
            "its layers read the device", f"{BUILDER}.build", layer, f"{BUILDER}.__init__"
        )
    rule = "vllm_ascend.ops.fla:torch_chunk_gated_delta_rule"
    assert tree.has(rule)
    return applied("its chunked rule is torch code", rule)


# --- kv_connector -------------------------------------------------------------------------------


def by_default(source: ast.Module, value: ast.expr) -> ast.expr:
    """What a name stands for where no environment variable asks for another module."""
    if not isinstance(value, ast.Name):
        return value
    (assigned,) = (
        node.value
        for node in ast.walk(source)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == value.id
    )
    return assigned.orelse if isinstance(assigned, ast.IfExp) else assigned


def connector(tree: Tree) -> str:
    """The module of what configurations call MooncakeConnectorV1."""
    for _, source in tree.mentioning({"MooncakeConnectorV1"}):
        for call in calls(source, "register_connector"):
            name, module = call.args[:2]
            if ast.unparse(name) == "'MooncakeConnectorV1'":
                return str(ast.literal_eval(by_default(source, module)))
    raise AssertionError("no MooncakeConnectorV1 is registered")


def kv_connector(tree: Tree, vllm: Tree, release: str) -> Derived:
    module = connector(tree)
    scheduler = vllm.module("vllm.v1.core.sched.scheduler")
    assert scheduler is not None
    assert tree.has(f"{module}:MooncakeConnectorWorker")
    why = []
    if not tree.has(f"{module}:MooncakeConnector.get_block_ids_with_load_errors"):
        why.append("a failed transfer is not reported")
        if "invalid_block_ids" not in words(scheduler):
            why.append("its vLLM knows no blocks that were not loaded")
    # Prefill frees a request's blocks after a time, and a decode that comes later reads them.
    if tree.has(f"{module}:KVCacheTaskTracker._retrieve_expired_requests"):
        ended = tree.node(f"{module}:MooncakeConnectorScheduler.request_finished")
        assert ended is not None
        given = {keyword.arg or "" for call in calls(ended, "dict") for keyword in call.keywords}
        assert "remote_block_ids" in given, "what prefill hands over is somewhere else"
        if not any(word in name for name in given for word in ("time", "expir", "deadline")):
            why.append("decode is not told when prefill's blocks expire")
    if not why:
        return Derived("retired", "it reports failures, and decode knows when blocks expire")
    return Derived("applied", "; ".join(why), None, frozenset({module}))


PATCHES: dict[str, Callable[[Tree, Tree, str], Derived]] = {
    "attention_router": attention_router,
    "gdn_attn": gdn_attn,
    "kv_connector": kv_connector,
    "rotary": rotary,
}
