"""Many adapters over one frozen base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapted import Adapted
from flax_tied_lora._merge import check_adapted


def adapter_axes(adapted: Adapted, axis: int | None = 0) -> Adapted:
    """Returns the ``in_axes`` of `jax.vmap` for stacked adapters over one frozen base.

    Example::

      stacked = tied_lora.stack([adapted_1, adapted_2])
      logits = jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacked), 0))(stacked, tokens)
    """
    check_adapted("adapter_axes", adapted)
    return Adapted(None, axis, axis, None, adapted.plan)


def stack(adapteds: list[Adapted]) -> Adapted:
    """Returns one `Adapted` with the adapters of several, stacked along a new first axis.

    All must be of one plan up to the config's alpha: same groups, same ranks. The frozen params are
    those of the first.

    Raises:
      ValueError: none given, or the groups differ.
    """
    if not adapteds:
        raise ValueError("stack: expected at least one Adapted")
    for each in adapteds:
        check_adapted("stack", each)
    first = adapteds[0]
    for other in adapteds[1:]:
        if other.plan.groups != first.plan.groups:
            raise ValueError(
                "stack: the adapters are of different groups or ranks; wrap them with the same "
                "targets and rank"
            )

    def stacked(*trees: Any) -> Any:
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    return dataclasses.replace(
        first,
        adapters=stacked(*(a.adapters for a in adapteds)),
        scaling=stacked(*(a.scaling for a in adapteds)),
    )
