"""tunix and gemma: their rows in docs/libraries/index.md."""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from tests.libraries import comparing, gemma_models, tunix_models
from tests.libraries.held import Held, assert_in_page, optax_step, row_of
from tests.libraries.reference import HEAD, HEADS, HIDDEN, KEY_HEADS, TOKENS, VOCABULARY, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COMMAND = "python -m pytest -m '' tests/libraries/test_tunix_held.py"
POSITIONS = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
MASK = np.broadcast_to(np.tril(np.ones((TOKENS.shape[1],) * 2, bool)), (*TOKENS.shape, 6))
_BODY = {"num_layers": 2, "embed_dim": WIDTH, "hidden_dim": HIDDEN, "num_heads": HEADS,
         "num_kv_heads": KEY_HEADS, "head_dim": HEAD}  # fmt: skip
# Family: of `tunix_models`, the fields of its config, and the reference. Llama 3 and Qwen 3 turn by
# an angle of their own, whatever the config says.
TUNIX: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma 3": (
        "gemma3",
        {**_BODY, "num_layers": 8, "num_embed": VOCABULARY, "sliding_window_size": 4,
         "param_dtype": jnp.float32, "global_base_frequency": 1_000_000},
        "gemma3",
    ),
}  # fmt: skip


def build(name: str) -> Held:
    family, fields, reference = TUNIX[name]
    of = tunix_models.FAMILIES[family]
    config = of.module.ModelConfig(**fields)
    with flax.config.temp_flip_flag("always_shard_variable", False):
        make = getattr(of.module, of.model)
        graph, like = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))

    def call(params: Any, tokens: Any) -> Any:
        return nnx.merge(graph, params)(tokens, POSITIONS, None, MASK)[0]

    def step(params: Any) -> tuple[float, float]:
        model = nnx.merge(graph, params)
        lora = tied_lora.LoraConfig(r=2, target_modules=of.targets)
        sites = tied_lora.nnx.trace(model, TOKENS, POSITIONS, None, MASK)
        adapted = tied_lora.nnx.wrap(model, lora, sites=sites)
        optimizer = nnx.Optimizer(adapted, optax.adamw(1e-3), wrt=nnx.LoRAParam)
        train = tied_lora.nnx.step(
            lambda m: comparing.loss_of(m(TOKENS, POSITIONS, None, MASK)[0], TOKENS)
        )
        return float(train(adapted, optimizer)), float(train(adapted, optimizer))

    return Held(
        library="tunix",
        family=name,
        reference=reference,
        call=call,
        like=like,
        names=names_of(config),
        table=comparing.TABLE,
        targets=of.targets,
        step=step,
        idiom="`nnx.Optimizer`",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNIX)
def test_the_family_of_tunix_is_held(name, tmp_path):
    with flax.config.temp_flip_flag("always_shard_variable", False):  # as importing tunix leaves it
        assert_in_page(row_of(build(name), tmp_path), COMMAND)


_GEMMA = {"num_embed": VOCABULARY, "embed_dim": WIDTH, "hidden_dim": HIDDEN, "num_heads": HEADS,
          "head_dim": HEAD, "num_kv_heads": KEY_HEADS, "use_post_attn_norm": True,
          "use_post_ffw_norm": True, "sliding_window_size": 4,
          "transpose_gating_einsum": True}  # fmt: skip
LOCAL, GLOBAL = gemma_models.LOCAL, gemma_models.GLOBAL
GEMMA: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma 2": (
        {**_GEMMA, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0,
         "attention_types": (LOCAL, GLOBAL) * 2},
        "gemma2",
    ),
    "Gemma 3": (
        {**_GEMMA, "final_logit_softcap": None, "use_qk_norm": True,
         "attention_types": (LOCAL,) * 5 + (GLOBAL,) + (LOCAL,) * 2,
         "local_base_frequency": 10_000, "global_base_frequency": 1_000_000},
        "gemma3",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GEMMA)
def test_the_family_of_gemma_is_held(name, tmp_path):
    fields, reference = GEMMA[name]
    config = gemma_models.TransformerConfig(**fields)
    model = gemma_models.Transformer(config=config, dtype=jnp.float32)

    def call(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, tokens).logits

    targets = gemma_models.FAMILIES["gemma3"].targets
    held = Held(
        library="gemma",
        family=name,
        reference=reference,
        call=call,
        like=jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"],
        names=names_of(config),
        table=comparing.TABLE,
        targets=targets,
        step=functools.partial(optax_step, call, targets=targets),
        idiom="Optax",
    )
    assert_in_page(row_of(held, tmp_path), COMMAND)
