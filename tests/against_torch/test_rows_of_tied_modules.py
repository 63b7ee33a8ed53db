"""What an adapter's file of PEFT holds under names that its config does not list."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.peft import save_adapter
from tests.against_torch.round_trip import Model
from tests.helpers.small_models import randomised


@pytest.mark.filterwarnings("ignore::flax_tied_lora.WeightTyingWarning")
def test_rows_of_modules_that_peft_ties_to_a_named_one(tmp_path):
    """BART's encoder and decoder read modules of their own, tied to the "shared" of the config."""
    model = Model("bart")
    rows = {"shared": [1, 2], "lm_head": [3]}
    adapted = model.wrap(trainable_token_indices=rows, ensure_weight_tying=False)
    adapted = adapted.replace(adapters=randomised(adapted.adapters))
    save_adapter(tmp_path / "adapter", adapted, model.names)
    loaded = model.load(tmp_path / "adapter")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.adapters, adapted.adapters))
    apply = tied_lora.adapt(model.logits)
    assert jnp.array_equal(apply(loaded), apply(adapted))
