"""tunix's models give their hidden states to the loss without logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from tests.helpers.full_logits import assert_same
from tests.helpers.oracle import perturbed
from tests.libraries.comparing import TABLE, TOKENS
from tests.libraries.tunix_models import build

# tunix 0.1.7 reads `Variable.value`, which Flax 0.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_loss_is_that_of_the_models_logits(family):
    case = build(family)
    cap = case.family.fields.get("final_logit_softcap")
    length = TOKENS.shape[1] - 1
    mask = jnp.tril(jnp.ones((len(TOKENS), length, length), bool))
    positions = jnp.broadcast_to(jnp.arange(length), (len(TOKENS), length))

    def fused(state: Any, tokens: Any) -> Any:
        model: Any = nnx.merge(case.graph, state)
        model(tokens[:, :-1], positions, None, mask, output_hidden_states=True)
        sown: Any = nnx.pop(model, nnx.Intermediate)["all_hidden_states"]
        (hidden,) = sown.get_value()
        table = model.embedder.input_embedding[...]
        return tied_lora.losses.linear_cross_entropy(
            hidden, table, tokens[:, 1:], logit_soft_cap=cap
        )

    def plain(state: Any, tokens: Any) -> Any:
        share = jax.nn.log_softmax(case.logits(state, tokens[:, :-1]).astype(jnp.float32))
        return -jnp.take_along_axis(share, tokens[:, 1:, None], axis=-1).mean()

    config = tied_lora.LoraConfig(r=2, target_modules=[TABLE])
    sites = tied_lora.trace(fused, case.state, TOKENS)
    adapted = perturbed(tied_lora.wrap(case.state, config, sites=sites))
    ours, theirs = (
        jax.jit(tied_lora.value_and_grad(tied_lora.adapt(f)))(adapted, jnp.asarray(TOKENS))
        for f in (fused, plain)
    )
    assert_same(ours, theirs, 1e-4)
