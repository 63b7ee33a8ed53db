"""Imitations of EasyDeL's, SkyRL tx's, bonsai's and Levanter's models, to be held."""

from __future__ import annotations

import functools
from typing import Any

from flax_tied_lora.names import names_of
from tests.libraries.decoder_like import FLAT, OUTPUTS_FIRST, WITH_HEADS, Like
from tests.libraries.held import Held, optax_step

_MODEL: dict[str, Any] = {
    "table": "model/embed_tokens/embedding", "layers": "model/layers", "last_norm": "model/norm",
    "leaf": "kernel", "axes": FLAT,
}  # fmt: skip
_EASYDEL = {**_MODEL, "scale": "kernel"}  # its head, which is not read, is left out
_SKYRL = {**_MODEL, "scale": "weight"}
# By the name of the table of names.
FAMILIES: dict[str, Like] = {
    "easydel/llama": Like("llama", **_EASYDEL),
    "easydel/qwen3": Like("qwen3", **_EASYDEL),
    "easydel/gemma3": Like("gemma3", **_EASYDEL),
    "skyrl-tx/llama": Like("llama", **_SKYRL),
    "skyrl-tx/qwen3": Like("qwen3", **_SKYRL),
    "skyrl/llama": Like("llama", **{**_SKYRL, "layers": "model/layers/_stacked"}, stacked=True),
    "bonsai/qwen3": Like(
        "qwen3",
        axes=WITH_HEADS,
        table="embedder/embedding",
        layers="layers",
        last_norm="final_norm",
        leaf="kernel",
        scale="scale",
        attention="attn",
        head="lm_head/kernel",
    ),
    "levanter/llama": Like(
        "llama",
        axes=OUTPUTS_FIRST,
        table="embeddings/token_embeddings/weight",
        layers="transformer/layers/stacked",
        last_norm="transformer/norm",
        leaf="weight",
        scale="weight",
        stacked=True,
    ),
}
LIBRARIES = {
    "easydel": "EasyDeL", "skyrl-tx": "SkyRL tx", "skyrl": "SkyRL tx 0.4", "bonsai": "bonsai",
    "levanter": "Levanter",
}  # fmt: skip
TITLES = {"llama": "Llama", "qwen3": "Qwen 3", "gemma3": "Gemma 3"}


def build(name: str) -> Held:
    like = FAMILIES[name]
    targets = [like.table, *(f"{p}_proj/{like.leaf}" for p in like.axes)]
    ties = [(like.table, like.head)] if like.head else None
    return Held(
        library=f"{LIBRARIES[name.partition('/')[0]]} (imitation)",
        family=TITLES[like.family],
        reference=like.family,
        call=like.logits,
        like=like.shapes,
        names=names_of(name, tie_word_embeddings=True),
        table=like.table,
        targets=targets,
        step=functools.partial(optax_step, like.logits, targets=targets, ties=ties),
        idiom="Optax",
        ties=ties,
    )
