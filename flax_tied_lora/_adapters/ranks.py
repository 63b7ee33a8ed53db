"""Adapters of other ranks: their factors, their plan and their config."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.plan import LORA, AdapterPlan, Plan
from flax_tied_lora._tree.boxes import boxed_as, unboxed


def with_ranks(what: str, adapted: Adapted, ranks: Mapping[str, int]) -> Adapted:
    """Returns the same deltas with factors of other ranks, filled up with zeros.

    Args:
      what: what errors call the function.
      ranks: by adapter key, for all factors.

    Raises:
      ValueError: a rank is less than an adapter has, or more than its matrix can have.
    """
    plan, lora, alphas = adapted.plan, dict(adapted.adapters[LORA]), {}
    for group, adapter in plan.adapters(LORA):
        rank, key = ranks[adapter.key], adapter.key
        if rank < adapter.rank:
            raise ValueError(
                f"{what}: {key!r} has rank {adapter.rank}, found rank {rank}, which does not hold "
                "it. arithmetic.combine([adapted], [1.0], how='svd', rank=...) is the closest"
            )
        if rank > group.rank_limit(adapter):
            raise ValueError(
                f"{what}: rank {rank} for {key!r} {list(group.shape)}, which has rank "
                f"{group.rank_limit(adapter)} at most"
            )
        lora[key] = filled(lora[key], len(group.cols), rank)
        times = math.sqrt if plan.config.use_rslora else float
        alpha = plan.config.alpha_for(adapter.module)
        # The scaling stays as it is, so alpha grows with the rank.
        alphas[key] = alpha * times(rank) / times(adapter.rank) if rank != adapter.rank else alpha
    if all(ranks[a.key] == a.rank for _, a in plan.adapters(LORA)):
        return adapted
    groups = tuple(
        dataclasses.replace(g, adapters=tuple(_of_rank(a, ranks) for a in g.adapters))
        for g in plan.groups
    )
    factors = [a for g in groups for a in g.adapters if a.kind == LORA]
    config = with_patterns(what, plan.config, factors, alphas)
    adapters = {**adapted.adapters, LORA: lora}
    return dataclasses.replace(adapted, adapters=adapters, plan=Plan.of(groups, config))


def _of_rank(adapter: AdapterPlan, ranks: Mapping[str, int]) -> AdapterPlan:
    return (
        dataclasses.replace(adapter, rank=ranks[adapter.key]) if adapter.kind == LORA else adapter
    )


def filled(factors: Mapping[str, Any], n_cols: int, rank: int) -> dict[str, Any]:
    """Returns an adapter's factors filled up with zeros to a rank; stacked ones, too.

    Args:
      factors: ``lora_a`` [..., r] and ``lora_b`` [..., r, cols...]; others stay as they are.
      n_cols: how many axes ``cols...`` are.
    """
    result = dict(factors)
    for name, axis in (("lora_a", -1), ("lora_b", -1 - n_cols)):
        array = unboxed(factors[name])
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        result[name] = boxed_as(factors[name], jnp.pad(array, widths))
    return result


def with_patterns(
    what: str, config: LoraConfig, adapters: Sequence[AdapterPlan], alphas: Mapping[str, float],
    **changes: Any,
) -> LoraConfig:  # fmt: skip
    """Returns a config that gives these adapters their ranks and alphas.

    The commonest are ``r`` and ``lora_alpha``; the patterns have the others' modules.
    """
    if config.init_lora_weights == "orthogonal":
        changes["init_lora_weights"] = True  # it wants even ranks
    values = {a.key: (a.rank, float(alphas[a.key])) for a in adapters}
    r, alpha = collections.Counter(values.values()).most_common(1)[0][0]
    names: dict[str, tuple[int, float]] = {}
    for a in adapters:
        # Of a group that several targets name, wrap looks every one of them up.
        extra = a.targets if len(a.targets) > 1 else ()
        names |= {re.escape(name): values[a.key] for name in (a.module, *extra)}
    # A pattern fits the end of a path, and the first one that fits counts.
    longest = sorted(names, key=len, reverse=True)
    for listed in ([n for n in longest if names[n] != (r, alpha)], longest):
        patterns = {
            "rank_pattern": {
                n: names[n][0] for n in listed if names[n][0] != r or listed == longest
            },
            "alpha_pattern": {
                n: names[n][1] for n in listed if names[n][1] != alpha or listed == longest
            },
        }
        made = dataclasses.replace(config, r=r, lora_alpha=alpha, **patterns, **changes)
        if all(
            (made.rank_for(a.module), made.alpha_for(a.module)) == values[a.key] for a in adapters
        ):
            return made
    modules = collections.Counter(a.module for a in adapters).most_common(1)
    raise ValueError(
        f"{what}: the leaves of {modules[0][0]!r} get different ranks, which no rank_pattern can "
        "say; combine adapters of the same leaves"
    )
