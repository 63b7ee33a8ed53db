"""Tiny models of MaxText, on its own configs, as NNX modules and as Linen ones."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # no clients of Google's cloud

import jax
import maxtext
import numpy as np
import optax
from flax import nnx
from flax.core import meta

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from maxtext.configs import pyconfig
    from maxtext.models import models
    from maxtext.trainers.pre_train import train

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from tests.libraries.held import Held, optax_step
from tests.libraries.reference import (
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
)

ROWS = 128  # of a table that is padded for a mesh
BATCH, LENGTH = TOKENS.shape
_BODY = {
    "base_emb_dim": WIDTH, "base_num_query_heads": HEADS, "base_num_kv_heads": KEY_HEADS,
    "head_dim": HEAD, "base_mlp_dim": HIDDEN, "base_num_decoder_layers": 2, "vocab_size": ROWS,
    "normalization_layer_epsilon": 1e-6, "rope_max_timescale": 10_000,
    "logits_via_embedding": True, "sliding_window_size": 4,
}  # fmt: skip
_SILU = {"mlp_activations": ["silu", "linear"], "normalize_embedding_logits": False}
_GEMMA = {**_BODY, "mlp_activations": ["gelu", "linear"], "use_post_attn_norm": True,
          "use_post_ffw_norm": True}  # fmt: skip
# Family: fields of its config, the reference.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama 3.1": (
        {**_BODY, **_SILU, "decoder_block": "llama2", "base_emb_dim": HEADS * HEAD,
         "rope_type": "llama3.1", "rope_use_scale": False},
        "llama",
    ),
    "Llama 2": (
        {**_BODY, **_SILU, "decoder_block": "llama2", "base_emb_dim": HEADS * HEAD},
        "llama",
    ),
    "Qwen 3": ({**_BODY, **_SILU, "decoder_block": "qwen3", "use_qk_norm": True}, "qwen3"),
    # A block of Gemma 2 is two layers.
    "Gemma 2": (
        {**_GEMMA, "decoder_block": "gemma2", "final_logits_soft_cap": 30.0,
         "attn_logits_soft_cap": 50.0},
        "gemma2",
    ),
    "Gemma 3": (
        {**_GEMMA, "decoder_block": "gemma3", "model_name": "gemma3-4b",
         "base_num_decoder_layers": 8, "rope_max_timescale": 1_000_000,
         "local_rope_max_timescale": 10_000, "rope_linear_scaling_factor": 1.0,
         "use_multimodal": False},
        "gemma3",
    ),
}  # fmt: skip


def config_of(family: str, scanned: bool) -> Any:
    """Returns MaxText's config of a family."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(
        ["", str(base)],
        **FAMILIES[family][0],
        scan_layers=scanned,
        run_name="tiny",
        base_output_directory=tempfile.gettempdir(),
        override_model_config=True,
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        per_device_batch_size=BATCH,
        max_target_length=LENGTH,
        dtype="float32",
        weight_dtype="float32",
        matmul_precision="highest",
        attention="dot_product",
        enable_dropout=False,
    )


POSITIONS = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
SEGMENTS = np.ones(TOKENS.shape, np.int32)
DATA = {
    "inputs": TOKENS, "inputs_position": POSITIONS, "inputs_segmentation": SEGMENTS,
    "targets": np.roll(TOKENS, -1, 1), "targets_position": POSITIONS,
    "targets_segmentation": SEGMENTS,
}  # fmt: skip
_INPUTS = {"decoder_segment_ids": SEGMENTS, "enable_dropout": False}


@functools.cache
def build(family: str, scanned: bool, linen: bool = False) -> Held:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(family, scanned)
    axes = config.mesh_axes  # of one device, whatever the process has
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * len(axes)), axes)
    attention = ["query", "key", "value", "out"]
    if family == "Gemma 2":
        attention = [f"self_attention_{x}/{p}" for x in ("local", "global") for p in attention]
    targets = ["token_embedder", *attention, "wi_0", "wi_1", "wo"]
    make = functools.partial(models.Transformer, config, mesh, None)

    if linen:
        module = models.transformer_as_linen(config, mesh, None)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        init = functools.partial(module.init, keys, TOKENS, POSITIONS, **_INPUTS)
        like = meta.unbox(jax.eval_shape(init))["params"]

        def call(params: Any, tokens: Any) -> Any:
            return module.apply({"params": params}, tokens, POSITIONS, **_INPUTS)
    else:
        graph, like, rest = nnx.split(make(rngs=nnx.Rngs(0)), nnx.Param, ...)

        def call(params: Any, tokens: Any) -> Any:
            return nnx.merge(graph, params, rest, copy=True)(tokens, POSITIONS, **_INPUTS)

    def step(params: Any) -> tuple[float, float]:
        if linen:
            return optax_step(call, params, targets)
        lora = tied_lora.LoraConfig(r=2, target_modules=targets)
        return _nnx_step(nnx.merge(graph, params, rest), lora, config)

    return Held(
        library="MaxText",
        family=f"{family}, {'Linen' if linen else 'NNX'}{', scanned' if scanned else ''}",
        reference=FAMILIES[family][1],
        call=call,
        like=like,
        names=names_of(config, vocab_size=VOCABULARY),
        table="token_embedder/embedding",
        targets=targets,
        step=step,
        idiom="Optax" if linen else "`nnx.Optimizer`, MaxText's `loss_fn`",
        exact=False,
    )


def _nnx_step(model: Any, lora: Any, config: Any) -> tuple[float, float]:
    sites = tied_lora.nnx.trace(model, TOKENS, POSITIONS, **_INPUTS)
    adapted = tied_lora.nnx.wrap(model, lora, sites=sites)
    optimizer = nnx.Optimizer(adapted, optax.adamw(1e-3), wrt=nnx.LoRAParam)

    def loss(model: Any) -> Any:
        return train.loss_fn(model, config, dict(DATA), None, None)[0]

    step = tied_lora.nnx.step(loss)
    return float(step(adapted, optimizer)), float(step(adapted, optimizer))
