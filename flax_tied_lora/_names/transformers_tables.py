"""The tables of names of transformers' Flax families.

There a leaf's path is the PyTorch module's name, so that a table is a list of modules by kind.
"""

from __future__ import annotations

from collections.abc import Callable

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import Line, make_line

# The leaves of a kind of module: leaf name, parameter, and where need be layout and kind.
_LEAVES: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear": (("kernel", "weight", "in out -> out in", "linear"), ("bias", "bias")),
    # Flax's Conv1D stores [out, in] and PyTorch's [in, out]: each the reverse of its linear layer.
    "conv1d": (("kernel", "weight", "out in -> in out", "conv1d"), ("bias", "bias")),
    "norm": (("scale", "weight"), ("bias", "bias")),
    "rms_norm": (("weight", "weight"),),
    "embedding": (("embedding", "weight", "row column -> row column", "embedding"),),
}
_QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")


def _lines(prefix: str, **modules: str) -> list[Line]:
    """Returns the lines for the modules of each kind, with the prefix and without."""
    lines = []
    for kind, names in modules.items():
        for module in names.split():
            for start in {prefix: None, "": None}:
                name = f"{start}.{module}" if start else module
                lines += [
                    make_line((f"{name.replace('.', '/')}/{leaf}", f"{name}.{parameter}", *rest))
                    for leaf, parameter, *rest in _LEAVES[kind]
                ]
    return lines


def _causal(
    prefix: str, embedding_module: str, modules: dict[str, str], *, tied: bool = True,
    keeps_head_leaf: bool = False, ignored: str | None = None, hints: tuple[str, ...] = (),
) -> Family:  # fmt: skip
    """Returns a family of causal language models: a body under a prefix, and an ``lm_head``.

    Args:
      embedding_module: path of the input embedding in the body.
      modules: modules of the body by kind, separated by spaces.
      ignored: a pattern, as in `Family`.
    """
    return Family(
        (*_lines(prefix, **modules), *_lines("", linear="lm_head")),
        f"{prefix}/{embedding_module}/embedding",
        tied=tied,
        keeps_head_leaf=keeps_head_leaf,
        ignored=() if ignored is None else (ignored,),
        prefix=prefix,
        hints=hints,
    )


def _gpt2() -> Family:
    projections = " ".join(
        f"h.{{}}.{attention}.{p}"
        for attention in ("attn", "crossattention")
        for p in ("c_attn", "q_attn", "c_proj")
    )
    modules = {
        "embedding": "wte wpe",
        "norm": "h.{}.ln_1 h.{}.ln_2 h.{}.ln_cross_attn ln_f",
        "conv1d": f"{projections} h.{{}}.mlp.c_fc h.{{}}.mlp.c_proj",
    }
    masks = r"(.*\.)?h\.\d+\.(cross)?attn\.(masked_)?bias"
    return _causal("transformer", "wte", modules, ignored=masks)


def _gpt_neo() -> Family:
    attention = " ".join(f"h.{{}}.attn.attention.{p}" for p in _QKV_OUT)
    modules = {
        "embedding": "wte wpe",
        "norm": "h.{}.ln_1 h.{}.ln_2 ln_f",
        "linear": f"{attention} h.{{}}.mlp.c_fc h.{{}}.mlp.c_proj",
    }
    masks = r"(.*\.)?attn\.attention\.(masked_)?bias"
    return _causal("transformer", "wte", modules, ignored=masks)


def _opt() -> Family:
    attention = " ".join(f"decoder.layers.{{}}.self_attn.{p}" for p in _QKV_OUT)
    modules = {
        "embedding": "decoder.embed_tokens decoder.embed_positions",
        "norm": "decoder.layers.{}.self_attn_layer_norm decoder.layers.{}.final_layer_norm "
        "decoder.final_layer_norm",
        "linear": f"{attention} decoder.layers.{{}}.fc1 decoder.layers.{{}}.fc2 "
        "decoder.project_in decoder.project_out",
    }
    return _causal("model", "decoder/embed_tokens", modules)


def _bloom() -> Family:
    modules = {
        "embedding": "word_embeddings",
        "norm": "word_embeddings_layernorm h.{}.input_layernorm h.{}.post_attention_layernorm ln_f",
        "linear": "h.{}.self_attention.query_key_value h.{}.self_attention.dense "
        "h.{}.mlp.dense_h_to_4h h.{}.mlp.dense_4h_to_h",
    }
    return _causal("transformer", "word_embeddings", modules)


def _llama(tied: bool, keeps_head_leaf: bool, hints: tuple[str, ...] = ()) -> Family:
    attention = " ".join(f"layers.{{}}.self_attn.{p}_proj" for p in "qkvo")
    mlp = " ".join(f"layers.{{}}.mlp.{p}_proj" for p in ("gate", "up", "down"))
    modules = {
        "embedding": "embed_tokens",
        "rms_norm": "layers.{}.input_layernorm layers.{}.post_attention_layernorm norm",
        "linear": f"{attention} {mlp}",
    }
    return _causal(
        "model",
        "embed_tokens",
        modules,
        tied=tied,
        keeps_head_leaf=keeps_head_leaf,
        ignored=r"(.*\.)?rotary_emb\.inv_freq",
        hints=hints,
    )


def _bert(prefix: str) -> Family:
    layer = "encoder.layer.{}."
    linear = [layer + m for m in ("intermediate.dense", "output.dense")]
    norm = [layer + "output.LayerNorm"]
    for attention in (layer + "attention.", layer + "crossattention."):
        linear += [attention + m for m in ("self.query", "self.key", "self.value", "output.dense")]
        norm.append(attention + "output.LayerNorm")
    body = _lines(
        prefix,
        embedding="embeddings.word_embeddings embeddings.position_embeddings "
        "embeddings.token_type_embeddings",
        norm=" ".join(["embeddings.LayerNorm", *norm]),
        linear=" ".join([*linear, "pooler.dense"]),
    )
    if prefix == "bert":
        bias, module = "cls/predictions/bias", "cls.predictions"
        heads = _lines(
            "",
            linear="cls.predictions.transform.dense cls.seq_relationship classifier qa_outputs",
            norm="cls.predictions.transform.LayerNorm",
        )
    else:
        bias, module = "lm_head/bias", "lm_head"
        heads = _lines(
            "",
            linear="lm_head.dense classifier classifier.dense classifier.out_proj qa_outputs",
            norm="lm_head.layer_norm",
        )
    decoder = f"{module}.decoder"
    head_leaf = f"{decoder.replace('.', '/')}/kernel"
    output = [
        make_line((bias, f"{module}.bias")),
        make_line((head_leaf, f"{decoder}.weight"), "linear"),
    ]
    return Family(
        (*body, *heads, *output),
        f"{prefix}/embeddings/word_embeddings/embedding",
        heads=(decoder,),
        head_leaf=head_leaf,
        same=((bias, (f"{decoder}.bias",)),),
        ignored=(r"(.*\.)?embeddings\.(position_ids|token_type_ids)",),
        prefix=prefix,
        renamed=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
    )


def _t5() -> Family:
    linear, norm, embedding = ["lm_head"], [], ["shared"]
    for stack in ("encoder", "decoder"):
        layer = stack + ".block.{}.layer.{}."
        for attention in ("SelfAttention", "EncDecAttention"):
            linear += [f"{layer}{attention}.{p}" for p in "qkvo"]
            embedding.append(f"{layer}{attention}.relative_attention_bias")
        linear += [f"{layer}DenseReluDense.{p}" for p in ("wi", "wi_0", "wi_1", "wo")]
        norm += [f"{layer}layer_norm", f"{stack}.final_layer_norm"]
    return Family(
        tuple(
            _lines(
                "", linear=" ".join(linear), rms_norm=" ".join(norm), embedding=" ".join(embedding)
            )
        ),
        "shared/embedding",
        shared=("encoder.embed_tokens", "decoder.embed_tokens"),
        # Old files have one where the model has none.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


def _bart() -> Family:
    linear, norm, embedding = [], [], ["shared", "decoder.embed_tokens"]
    for stack in ("encoder", "decoder"):
        layer = stack + ".layers.{}."
        for attention in ("self_attn", "encoder_attn"):
            linear += [f"{layer}{attention}.{p}" for p in _QKV_OUT]
            norm.append(f"{layer}{attention}_layer_norm")
        linear += [layer + "fc1", layer + "fc2"]
        norm += [layer + "final_layer_norm", stack + ".layernorm_embedding"]
        embedding.append(stack + ".embed_positions")
    return Family(
        (
            *_lines(
                "model",
                linear=" ".join(linear),
                norm=" ".join(norm),
                embedding=" ".join(embedding),
            ),
            *_lines("", linear="lm_head qa_outputs classification_head.dense "
                    "classification_head.out_proj"),
            make_line(("final_logits_bias", "final_logits_bias", "one v -> one v", "parameter")),
        ),
        "model/shared/embedding",
        shared=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
        other_tables=("model/decoder/embed_tokens/embedding",),  # BartForCausalLM
        ignored=(r"(.*\.)?(encoder|decoder)\.version",),
        prefix="model",
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "opt": _opt,
    "bloom": _bloom,
    # Flax's Llama and Mistral have an lm_head of their own, whatever the config says of ties.
    "llama": lambda: _llama(
        tied=False,
        keeps_head_leaf=True,
        hints=(
            r"embedder/.*|layers/\d+/attn/.*|.*/w",
            "This looks like tunix's Llama 3: its table is names_of('tunix/llama3')",
        ),
    ),
    "mistral": lambda: _llama(tied=False, keeps_head_leaf=True),
    "gemma": lambda: _llama(tied=True, keeps_head_leaf=False),
    "bert": lambda: _bert("bert"),
    "roberta": lambda: _bert("roberta"),
    "t5": _t5,
    "bart": _bart,
}
