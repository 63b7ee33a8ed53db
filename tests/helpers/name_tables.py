"""Tables of names and params for the tests of `names`: an own model, and tunix's."""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from flax_tied_lora.names import Names, names_of

# A model of nobody's: a table tied to the head, fused and stacked leaves, every kind of parameter.
OWN = (
    ("embed/embedding", "model.embed_tokens.weight"),
    ("block_{}/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "d h k -> (h k) d"),
    ("block_{}/attn/kv", "model.layers.{}.self_attn.k_proj.weight", "0 d h k -> (h k) d"),
    ("block_{}/attn/kv", "model.layers.{}.self_attn.v_proj.weight", "1 d h k -> (h k) d"),
    ("block_{}/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight"),
    ("block_{}/mlp/up/bias", "model.layers.{}.mlp.up_proj.bias"),
    ("experts/{}/w", "moe.{}.experts.{expert}.w.weight", "i {expert} o -> o i"),
    ("scan/norm/scale", "scan.{layer}.norm.weight", "{layer} d -> d"),
    ("patch/kernel", "patch.weight", "h w i o -> o i h w"),
    ("c/kernel", "c.weight", "o i -> i o", "conv1d"),
    ("gate", "gate.alpha", "->"),
    ("row", "row.weight_row", "d -> 1 d"),
)
SHAPES = {
    "embed/embedding": (7, 4),
    "block_0/attn/q/kernel": (4, 2, 3),
    "block_0/attn/kv": (2, 4, 2, 3),
    "block_11/attn/q/kernel": (4, 2, 3),
    "block_11/attn/kv": (2, 4, 2, 3),
    "block_0/mlp/up/kernel": (4, 5),
    "block_0/mlp/up/bias": (5,),
    "experts/3/w": (4, 12, 5),
    "scan/norm/scale": (2, 4),
    "patch/kernel": (2, 3, 4, 5),
    "c/kernel": (6, 4),
    "gate": (),
    "row": (4,),
}
TIED = {"embed/embedding": ("lm_head",)}


def own() -> Names:
    return names_of(None, OWN, tied=TIED)


def draw(shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(3)
    flat = {p: np.asarray(rng.standard_normal(s), dtype) for p, s in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert set(found) == set(expected)
    for path, x in found.items():
        assert x.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


# Paths and shapes of tunix's models: vocabulary 96, width 32, 4 heads of 16, 2 for keys, hidden 64.
MLP = {
    "layers/0/mlp/down_proj/kernel": (64, 32),
    "layers/0/mlp/gate_proj/kernel": (32, 64),
    "layers/0/mlp/up_proj/kernel": (32, 64),
}
LLAMA3 = {
    "embedder/input_embedding": (96, 32),
    "final_norm/w": (32,),
    "layers/0/attn/k_proj/w": (32, 2, 16),
    "layers/0/attn/o_proj/w": (4, 16, 32),
    "layers/0/attn/q_proj/w": (32, 4, 16),
    "layers/0/attn/v_proj/w": (32, 2, 16),
    "layers/0/input_layernorm/w": (32,),
    **MLP,
    "layers/0/post_attention_layernorm/w": (32,),
}
QWEN2 = {
    **LLAMA3,
    "layers/0/attn/k_bias": (32,),
    "layers/0/attn/q_bias": (64,),
    "layers/0/attn/v_bias": (32,),
}
QWEN3 = {**LLAMA3, "layers/0/attn/k_norm/w": (16,), "layers/0/attn/q_norm/w": (16,)}
QWEN3_MOE = {
    **{p: s for p, s in QWEN3.items() if p not in MLP},
    "layers/0/mlp/down_proj": (4, 64, 32),
    "layers/0/mlp/gate_proj": (4, 32, 64),
    "layers/0/mlp/router/kernel": (32, 4),
    "layers/0/mlp/up_proj": (4, 32, 64),
}
UNTIED = {"lm_head/w": (32, 96)}
GEMMA2 = {
    "embedder/input_embedding": (96, 32),
    "final_norm/scale": (32,),
    "layers/0/attn/attn_vec_einsum/w": (4, 16, 32),
    "layers/0/attn/kv_einsum/w": (2, 2, 32, 16),
    "layers/0/attn/q_einsum/w": (4, 32, 16),
    **MLP,
    "layers/0/post_attn_norm/scale": (32,),
    "layers/0/post_ffw_norm/scale": (32,),
    "layers/0/pre_attention_norm/scale": (32,),
    "layers/0/pre_ffw_norm/scale": (32,),
}
EINSUMS = ("layers/0/attn/kv_einsum/w", "layers/0/attn/q_einsum/w")
GEMMA2_FUSED = {
    **{p: s for p, s in GEMMA2.items() if p not in EINSUMS},
    "layers/0/attn/qkv_einsum/w": (3, 4, 32, 16),
}
NORMS3 = {"layers/0/attn/_key_norm/scale": (16,), "layers/0/attn/_query_norm/scale": (16,)}


def gemma3(shapes):
    renamed = {p.replace("post_attn_norm", "post_attention_norm"): s for p, s in shapes.items()}
    return {**renamed, **NORMS3}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
TUNIX = {
    "llama3": ("tunix/llama3", {"tie_word_embeddings": True}, LLAMA3),
    "llama3_untied": ("tunix/llama3", {}, {**LLAMA3, **UNTIED}),
    "qwen2": ("tunix/qwen2", {"tie_word_embeddings": True}, QWEN2),
    "qwen2_untied": ("tunix/qwen2", {}, {**QWEN2, **UNTIED}),
    "qwen3": ("tunix/qwen3", {"tie_word_embeddings": True}, QWEN3),
    "qwen3_moe": ("tunix/qwen3", {}, {**QWEN3_MOE, **UNTIED}),
    "gemma2": ("tunix/gemma2", {}, GEMMA2),
    "gemma2_fused": ("tunix/gemma2", HEADS, GEMMA2_FUSED),
    "gemma3": ("tunix/gemma3", {}, gemma3(GEMMA2)),
    "gemma3_fused": ("tunix/gemma3", HEADS, gemma3(GEMMA2_FUSED)),
}


def tunix_names(case):
    family, config, _ = TUNIX[case]
    return names_of({"model_type": family, **config})
