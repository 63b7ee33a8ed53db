"""An adapter among others that have diverged: what they hold reaches nobody else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora


def among_nan(adapted: tied_lora.Adapted, slot: int) -> tied_lora.Adapted:
    """Returns an adapter, or none, selected from a stack whose other slots are NaN.

    Args:
      slot: 1 for the adapter; any that is not there, as -1, for none.
    """
    diverged = adapted.replace(adapters=jax.tree.map(lambda x: x * jnp.nan, adapted.adapters))
    stacked = tied_lora.stack([diverged, adapted, diverged])
    selected = tied_lora.select(stacked, jnp.int32(slot))
    alone = tied_lora.merge(adapted) if slot == 1 else tied_lora.base(adapted)
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6),
        tied_lora.merge(selected), alone,
    )  # fmt: skip
    return selected
