"""Adapters of other ranks: plans, configs and factors; and what adapters must have in common."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.fingerprint import differences, fingerprint
from flax_tied_lora._adapters.terms import shapes_of
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import boxed_as, unboxed
from flax_tied_lora._tree.paths import flatten, is_marker, is_tracer
from flax_tied_lora._tree.quantized_array import array_of

# Ranks


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
        own = dict(lora[key])
        own["lora_a"] = filled(own["lora_a"], -1, rank)
        own["lora_b"] = filled(own["lora_b"], -1 - len(group.cols), rank)
        lora[key] = own
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


def filled(factor: Any, axis: int, size: int) -> Any:
    array = unboxed(factor)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return boxed_as(factor, jnp.pad(array, widths))


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


# What adapters must have in common


def same_groups(what: str, first: Adapted, other: Adapted) -> None:
    """Refuses adapters of other groups, kinds or call sites; ranks may differ.

    Raises:
      ValueError: they are.
    """
    one, two = ({a.key: _layout(g, a) for g, a in x.plan.adapters()} for x in (first, other))
    odd = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
    if odd:
        raise ValueError(
            f"{what}: the adapters are of different groups: {', '.join(map(repr, odd[:3]))} "
            f"{'differ' if odd[0] in one and odd[0] in two else 'is in one of them only'}; wrap "
            "them with the same targets"
        )


def _layout(group: GroupPlan, adapter: AdapterPlan) -> Any:
    return layout_of(group), dataclasses.replace(adapter, rank=0, module="", targets=())


def layout_of(group: GroupPlan) -> Any:
    """Returns all that has to be equal for adapters of a group to be of one weight."""
    return dataclasses.replace(group, found=(), adapters=())


def same_base(what: str, first: Adapted, other: Adapted) -> None:
    """Refuses adapters of another base.

    The shape and a sample of every leaf are compared, where it is not the same array and can be
    read.

    Raises:
      ValueError: the bases differ.
    """
    one, two = flatten(first.params)[0], flatten(other.params)[0]
    for path in one if one.keys() == two.keys() else ():
        if is_marker(one[path]) != is_marker(two[path]):
            raise ValueError(
                f"{what}: {path!r} is tied in one of the adapters' bases only; wrap them with the "
                "same ties"
            )
    same = {p for p in one if p in two and one[p] is two[p]}
    known = [{p: _readable(x) for p, x in tree.items() if p not in same} for tree in (one, two)]
    lines = differences(*(fingerprint(tree, first.plan) for tree in known))
    if lines:
        raise ValueError(
            f"{what}: the adapters are of different bases: {'; '.join(lines[:3])}; expected the "
            "same params in all"
        )


def _readable(leaf: Any) -> Any:
    traced = is_tracer(array_of(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if traced else leaf


def check_single(what: str, adapted: Adapted) -> None:
    """Refuses stacked and abstract adapters.

    Raises:
      ValueError: they are.
    """
    for key, name, found, expected in shapes_of(adapted):
        if len(found) != len(expected):
            raise ValueError(
                f"{what}: {name} of {key!r} is {list(found)}, expected {list(expected)}: take "
                "stacked adapters one by one"
            )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapted.adapters)):
        raise ValueError(f"{what}: the adapters are abstract (ShapeDtypeStruct); expected arrays")


def refuse_residual(what: str, adapted: Adapted) -> None:
    """Refuses factors that started from the weight: their base is not the params' any more.

    Raises:
      ValueError: there are some.
    """
    for group, adapter in adapted.plan.adapters(LORA):
        if adapter.residual:
            raise ValueError(
                f"{what}: init_lora_weights={adapted.plan.config.init_lora_weights!r} took the "
                f"first values of its factors out of {group.key!r}, so they are no delta of "
                "the params; arithmetic.extract(params, merge(adapted), config) makes one of them"
            )
