"""The tiny models: for each kind its configuration and its random weights.

Random weights are easily useless for a test. With the customary small scales a token's own
embedding dominates the residual stream, the output is one token for ever, and a wrong RoPE hardly
shows. The scales here are chosen against that:

- embeddings are small beside what attention and the MLP add, and the head is not tied to them, so
  a token does not predict itself;
- queries and keys have gain (in the norms of Qwen3, elsewhere in the projections), so attention is
  sharp and follows the rotation;
- all tokens but whole words have a zero head row: they are never the greedy choice, so answers
  are readable and never end early.
"""

from __future__ import annotations

from _tiny_draw import Draw
from _tiny_gdn import qwen3_5_kind, qwen3_next_kind
from _tiny_parts import (
    ATTENTION_GAIN,
    EMBED_STD,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LOGIT_STD,
    MAX_POSITIONS,
    VALUE_GAIN,
    Kind,
    State,
    attention,
    feed_forward,
)

# YaRN's: shorter than the tests' longer prompts, so that scaling matters.
ORIGINAL_POSITIONS = 1024
GLM_HEAD_DIM, GLM_PARTIAL = 192, 0.5

# Of the first layer; shorter than most of the tests' prompts.
WINDOW = 32

VL_HEAD_DIM = HIDDEN // HEADS
VL_SECTIONS = [8, 12, 12]
PATCH, TEMPORAL, MERGE = 14, 2, 2
VISION_HIDDEN, VISION_INTERMEDIATE, VISION_DEPTH, VISION_HEADS = 128, 256, 2, 2
# An image token enters with what attention adds, above a word's embedding.
IMAGE_STD = 1.0


def draw_state(kind: Kind, vocab_size: int, silent: list[int], seed: int) -> State:
    """Return a model's state dictionary in float32."""
    draw = Draw(seed)
    embed = draw.normal(vocab_size, HIDDEN, std=EMBED_STD)
    head = draw.linear(vocab_size, HIDDEN, gain=LOGIT_STD)
    head[silent] = 0
    state = {
        f"{kind.prefix}embed_tokens.weight": embed,
        f"{kind.prefix}norm.weight": draw.full(HIDDEN),
        "lm_head.weight": head,
    }
    for i in range(kind.layers):
        state |= kind.weights(draw, f"{kind.prefix}layers.{i}.")
    return state | kind.more(draw)


def qwen3_kind(*, yarn: bool = False) -> Kind:
    """Return Qwen3: NeoX style, queries and keys normalised; with YaRN or without."""
    scaling = {
        "rope_type": "yarn",
        "factor": MAX_POSITIONS / ORIGINAL_POSITIONS,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
    }

    def config(_vocab: dict[str, int]) -> State:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": HEAD_DIM,
            "max_window_layers": LAYERS,
            "rope_scaling": scaling if yarn else None,
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def weights(draw: Draw, layer: str) -> State:
        attn = layer + "self_attn."
        return {
            **attention(draw, layer, HEAD_DIM),
            attn + "q_norm.weight": draw.full(HEAD_DIM, ATTENTION_GAIN),
            attn + "k_norm.weight": draw.full(HEAD_DIM, ATTENTION_GAIN),
            **feed_forward(draw, layer),
        }

    return Kind(config, weights)


def glm4_kind() -> Kind:
    """Return GLM-4: GPT-J style, half of each head turned; 96 is no power of two."""

    def config(_vocab: dict[str, int]) -> State:
        return {
            "architectures": ["Glm4ForCausalLM"],
            "model_type": "glm4",
            "head_dim": GLM_HEAD_DIM,
            "pad_token_id": 0,
            "partial_rotary_factor": GLM_PARTIAL,
        }

    def weights(draw: Draw, layer: str) -> State:
        state = attention(draw, layer, GLM_HEAD_DIM, gain=ATTENTION_GAIN)
        state |= feed_forward(draw, layer)
        halves = [state.pop(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up")]
        state[layer + "mlp.gate_up_proj.weight"] = draw.torch.cat(halves)
        state[layer + "post_self_attn_layernorm.weight"] = draw.full(HIDDEN)
        state[layer + "post_mlp_layernorm.weight"] = draw.full(HIDDEN)
        return state

    return Kind(config, weights)


def windowed_kind() -> Kind:
    """Return Llama with a sliding window in its first layer, and none in the others."""

    def config(_vocab: dict[str, int]) -> State:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": HEAD_DIM,
            "layer_types": ["sliding_attention", *["full_attention"] * (LAYERS - 1)],
            "sliding_window": WINDOW,
        }

    def weights(draw: Draw, layer: str) -> State:
        state = attention(draw, layer, HEAD_DIM, gain=ATTENTION_GAIN)
        return state | feed_forward(draw, layer)

    return Kind(config, weights)


def qwen25vl_kind() -> Kind:
    """Return Qwen2.5-VL: MRoPE in the text model, rotary by angles in the vision tower."""

    def config(vocab: dict[str, int]) -> State:
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "image_token_id": vocab["<|image_pad|>"],
            "video_token_id": vocab["<|video_pad|>"],
            "vision_token_id": vocab["<|vision_pad|>"],
            "vision_start_token_id": vocab["<|vision_start|>"],
            "vision_end_token_id": vocab["<|vision_end|>"],
            "max_window_layers": LAYERS,
            "rope_scaling": {"type": "mrope", "mrope_section": VL_SECTIONS},
            "sliding_window": MAX_POSITIONS,
            "use_sliding_window": False,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": VISION_DEPTH,
                "fullatt_block_indexes": [VISION_DEPTH - 1],
                "hidden_act": "silu",
                "hidden_size": VISION_HIDDEN,
                "in_channels": 3,
                "in_chans": 3,
                "intermediate_size": VISION_INTERMEDIATE,
                "num_heads": VISION_HEADS,
                "out_hidden_size": HIDDEN,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "spatial_patch_size": PATCH,
                "temporal_patch_size": TEMPORAL,
                "tokens_per_second": 2,
                "window_size": 8 * PATCH,
            },
        }

    def weights(draw: Draw, layer: str) -> State:
        attn = layer + "self_attn."
        return {
            **attention(draw, layer, VL_HEAD_DIM, gain=ATTENTION_GAIN),
            attn + "q_proj.bias": draw.full(HEADS * VL_HEAD_DIM, 0.0),
            attn + "k_proj.bias": draw.full(KV_HEADS * VL_HEAD_DIM, 0.0),
            attn + "v_proj.bias": draw.full(KV_HEADS * VL_HEAD_DIM, 0.0),
            **feed_forward(draw, layer),
        }

    return Kind(config, weights, more=vision_tower, images=True)


def vision_tower(draw: Draw) -> State:
    """Return Qwen2.5-VL's vision tower."""
    hidden, wide, merged = VISION_HIDDEN, VISION_INTERMEDIATE, VISION_HIDDEN * MERGE**2
    patch = draw.linear(hidden, 3 * TEMPORAL * PATCH**2, gain=EMBED_STD)
    state = {"visual.patch_embed.proj.weight": patch.view(hidden, 3, TEMPORAL, PATCH, PATCH)}

    def put(name: str, out_features: int, in_features: int, gain: float = 1.0) -> None:
        state[f"visual.{name}.weight"] = draw.linear(out_features, in_features, gain=gain)
        state[f"visual.{name}.bias"] = draw.full(out_features, 0.0)

    for i in range(VISION_DEPTH):
        block = f"blocks.{i}."
        state |= {f"visual.{block}norm{n}.weight": draw.full(hidden) for n in (1, 2)}
        put(block + "attn.qkv", 3 * hidden, hidden)
        # Queries and keys come first.
        state[f"visual.{block}attn.qkv.weight"][: 2 * hidden] *= ATTENTION_GAIN
        put(block + "attn.proj", hidden, hidden, gain=VALUE_GAIN)
        put(block + "mlp.gate_proj", wide, hidden)
        put(block + "mlp.up_proj", wide, hidden)
        put(block + "mlp.down_proj", hidden, wide)
    state["visual.merger.ln_q.weight"] = draw.full(hidden)
    put("merger.mlp.0", merged, merged, gain=2.0)
    put("merger.mlp.2", HIDDEN, merged, gain=IMAGE_STD)
    return state


KINDS: dict[str, Kind] = {
    "qwen3": qwen3_kind(),
    "qwen3-yarn": qwen3_kind(yarn=True),
    "glm4": glm4_kind(),
    "qwen2.5-vl": qwen25vl_kind(),
    "llama-window": windowed_kind(),
    "qwen3-next": qwen3_next_kind(),
    # The only sizes that vLLM 0.32's own CPU kernels take.
    "qwen3-next-square": qwen3_next_kind(key_dim=128),
    "qwen3-next-dense": qwen3_next_kind(dense=True),
    # The model before, as Qwen3.5 writes it.
    "qwen3.5": qwen3_5_kind(),
}
