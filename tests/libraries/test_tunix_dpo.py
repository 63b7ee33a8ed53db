"""tunix's `DPOTrainer` on an adapted module: preferences, with the base as the reference."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.libraries.comparing import far
from tests.libraries.test_tunix_nnx import wrapped
from tests.libraries.tunix_models import dpo_trainer

# tunix 0.1.7 reads `Variable.value`, which Flax 0.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NUMBERS = np.random.default_rng(3)
IDS = NUMBERS.integers(1, 40, (3, 2, 4))
MASK = np.ones((2, 4), bool)
DATA = dpo_trainer.TrainingInput(
    prompt_ids=IDS[0], prompt_mask=MASK, chosen_ids=IDS[1], chosen_mask=MASK,
    rejected_ids=IDS[2], rejected_mask=MASK,
)  # fmt: skip


@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
@pytest.mark.usefixtures("standard_promotion")
def test_trained_on_preferences(algorithm):
    """The reference is the base; the factors alone are trained, by the merged model's gradients."""
    adapted = wrapped("qwen3")
    reference = tied_lora.nnx.base(adapted) if algorithm == "dpo" else None
    frozen = jax.tree.map(np.asarray, tied_lora.nnx.params(adapted))
    config = dpo_trainer.DPOTrainingConfig(algorithm=algorithm, eval_every_n_steps=100, max_steps=3)
    with flax.config.temp_flip_flag("always_shard_variable", False):  # as tunix sets it
        trainer = dpo_trainer.DPOTrainer(adapted, reference, optax.sgd(0.05), config)
        inputs = trainer.gen_model_input_fn(trainer._prepare_inputs(DATA))

        def loss(model: Any) -> Any:
            return dpo_trainer.dpo_loss_fn(model, **inputs)[0]

        of_factors = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=of_factors)(adapted)
        expected, expected_grads = nnx.value_and_grad(
            lambda model: loss(tied_lora.nnx.merge(model)), argnums=of_factors
        )(adapted)
        assert far(value, expected) < 1e-5
        assert max(jax.tree.leaves(jax.tree.map(far, grads, expected_grads))) < 1e-5

        before = nnx.state(adapted, nnx.LoRAParam)
        wanted = jax.tree.map(lambda x, g: np.asarray(x - 0.05 * g), before, grads)
        trainer.train([DATA])
        got = nnx.state(adapted, nnx.LoRAParam)
        assert max(jax.tree.leaves(jax.tree.map(far, got, wanted))) < 1e-5
        trainer.train([DATA] * 3)
        assert trainer.train_steps == 3
        assert loss(adapted) < value
        trainer.close()
    jax.tree.map(np.testing.assert_array_equal, tied_lora.nnx.params(adapted), frozen)
    assert jnp.isfinite(value)
