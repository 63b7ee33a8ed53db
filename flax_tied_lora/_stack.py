"""Many adapters over one frozen base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapted import Adapted
from flax_tied_lora._arithmetic.ranks import same_base, same_groups, with_ranks
from flax_tied_lora._merge import check_adapted
from flax_tied_lora._plan import LORA


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

    All must be of the same groups and the same base. Ranks and alphas may differ: factors are
    filled up with zeros to the largest rank of their group. The frozen params are those of the
    first.

    Raises:
      ValueError: none given, or the groups or the bases differ.
      TypeError: not an `Adapted`.
    """
    if not adapteds:
        raise ValueError("stack: expected at least one Adapted")
    for each in adapteds:
        check_adapted("stack", each)
    for other in adapteds[1:]:
        same_groups("stack", adapteds[0], other)
        same_base("stack", adapteds[0], other)
    ranks: dict[str, int] = {}
    for _, adapter in (pair for each in adapteds for pair in each.plan.adapters(LORA)):
        ranks[adapter.key] = max(adapter.rank, ranks.get(adapter.key, 0))
    adapteds = [with_ranks("stack", each, ranks) for each in adapteds]

    def stacked(*trees: Any) -> Any:
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    return dataclasses.replace(
        adapteds[0],
        adapters=stacked(*(a.adapters for a in adapteds)),
        scaling=stacked(*(a.scaling for a in adapteds)),
    )
