"""Adapters of several plans brought into the form of one, so that they can stand side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.compatible import layout_of
from flax_tied_lora._adapters.make import DTYPE, make_adapters
from flax_tied_lora._adapters.ranks import filled
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import boxed_as, boxes_of, unboxed
from flax_tied_lora._tree.paths import flatten


def common_plan(what: str, plans: Sequence[Plan], rank: int | None = None) -> Plan:
    """Returns the plan with the adapters of all, each of its largest rank and with all its tokens.

    Args:
      what: what errors call the function.
      plans: of one base. The config is the first one's.
      rank: of all factors, where their matrices can have it.

    Raises:
      ValueError: a weight is adapted in ways that cannot stand side by side.
    """
    groups: dict[str, GroupPlan] = {}
    for group in (g for plan in plans for g in plan.groups):
        groups[group.key] = _both(what, groups.get(group.key, group), group)
    roomy = tuple(
        dataclasses.replace(g, adapters=tuple(_of_rank(what, g, a, rank) for a in g.adapters))
        for g in groups.values()
    )
    largest = max((a.rank for g in roomy for a in g.adapters), default=0)
    first = plans[0]
    if roomy == first.groups:
        return first
    config = first.config if not largest else dataclasses.replace(first.config, r=largest)
    return Plan.of(roomy, config)


def _both(what: str, first: GroupPlan, other: GroupPlan) -> GroupPlan:
    if not other.adapters or not first.adapters:
        return first if first.adapters else other
    if layout_of(first) != layout_of(other):
        raise ValueError(
            f"{what}: the adapters are of different groups: {first.key!r} has rows {first.rows} "
            f"and columns {first.cols} in one, rows {other.rows} and columns {other.cols} in "
            "another; wrap them with the same sites and ties"
        )
    found = {(a.kind, a.key): a for a in first.adapters}
    for adapter in other.adapters:
        own = found.get((adapter.kind, adapter.key), adapter)
        check_alike(what, own, adapter)
        tokens = tuple(dict.fromkeys((*own.tokens, *adapter.tokens)))
        found[adapter.kind, adapter.key] = dataclasses.replace(
            own, rank=max(own.rank, adapter.rank), tokens=tokens
        )
    return dataclasses.replace(first, adapters=tuple(found.values()))


def check_alike(what: str, one: AdapterPlan, other: AdapterPlan) -> None:
    """Refuses adapters of one key that are not of one form, whatever their rank and tokens.

    Raises:
      ValueError: they are.
    """
    for name, meaning in (
        ("dora", "is DoRA in one and LoRA in another"),
        ("residual", "started from the weight (PiSSA, OLoRA) in one and not in another"),
        ("members", "is for other leaves of its group"),
        ("sites", "is for other call sites"),
        ("span", "is another part of the leaf"),
    ):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(
                f"{what}: {one.key!r} {meaning}; stack adapters of one form, each form in a stack "
                "of its own"
            )


def _of_rank(what: str, group: GroupPlan, adapter: AdapterPlan, rank: int | None) -> AdapterPlan:
    if adapter.kind != LORA or rank is None:
        return adapter
    if adapter.rank > rank:
        raise ValueError(
            f"{what}: {adapter.key!r} has rank {adapter.rank}, more than rank={rank} has room for"
        )
    return dataclasses.replace(adapter, rank=min(rank, group.rank_limit(adapter)))


def fitted(what: str, adapted: Adapted | None, plan: Plan, params: Any = None) -> tuple[Any, Any]:
    """Returns the adapters and the scaling of an `Adapted`, or of none, in the form of a plan.

    Factors are filled up with zeros to the plan's rank. What there is no adapter for gets one that
    leaves its weight as it is.

    Raises:
      ValueError: the plan has no room for an adapter.
    """
    found, own, scalings = {}, {}, {}
    if adapted is not None:
        _check_room(what, adapted.plan, plan)
        found = {(a.kind, a.key): a for _, a in adapted.plan.adapters()}
        params, own, scalings = adapted.params, adapted.adapters, adapted.scaling
    start = _unadapted(plan, params, [
        a for _, a in plan.adapters()
        if (a.kind, a.key) not in found or found[a.kind, a.key].tokens != a.tokens
    ])  # fmt: skip
    adapters: dict[str, dict[str, Any]] = {LORA: {}}
    for group, adapter in plan.adapters():
        kind, key = adapter.kind, adapter.key
        mine = found.get((kind, key))
        value = start[kind][key] if mine is None else own[kind][key]
        if mine is not None and kind == LORA:
            value = filled(value, len(group.cols), adapter.rank)
        if mine is not None and mine.tokens != adapter.tokens:
            value = _rows_among(mine.tokens, value, adapter.tokens, start[kind][key])
        adapters.setdefault(kind, {})[key] = value
    keys = [a.key for _, a in plan.adapters(LORA)]
    return adapters, {k: scalings[k] if k in scalings else jnp.zeros((), DTYPE) for k in keys}


def _check_room(what: str, own: Plan, plan: Plan) -> None:
    room = {(a.kind, a.key): (g, a) for g, a in plan.adapters()}
    for group, adapter in own.adapters():
        if (adapter.kind, adapter.key) not in room:
            raise ValueError(
                f"{what}: there is no room for {adapter.key!r} ({adapter}); these have it: "
                f"{', '.join(repr(key) for _, key in list(room)[:5])}. Stack it with the others "
                "from the start"
            )
        there, roomy = room[adapter.kind, adapter.key]
        if layout_of(there) != layout_of(group):
            raise ValueError(
                f"{what}: {group.key!r} has rows {group.rows} and columns {group.cols}, in the "
                f"stack rows {there.rows} and columns {there.cols}; wrap it with the same sites "
                "and ties"
            )
        check_alike(what, roomy, adapter)
        if adapter.rank > roomy.rank:
            raise ValueError(
                f"{what}: {adapter.key!r} has rank {adapter.rank}, and there is room for "
                f"{roomy.rank}; make room from the start: tied_lora.stack([...], "
                f"rank={adapter.rank})"
            )
        odd = [t for t in adapter.tokens if t not in roomy.tokens]
        if odd:
            raise ValueError(
                f"{what}: {adapter.key!r} replaces token {odd[0]}, and there is room for tokens "
                f"{list(roomy.tokens)[:10]}; stack it with the others from the start"
            )


def _unadapted(
    plan: Plan, params: Any, adapters: Sequence[AdapterPlan]
) -> Mapping[str, Mapping[str, Any]]:
    """Returns such values for some of a plan's adapters that their weights stay as they are."""
    if not adapters:
        return {}
    groups = tuple(
        dataclasses.replace(g, adapters=tuple(a for a in g.adapters if a in adapters))
        for g in plan.groups
    )
    part = Plan.of(groups, plan.config)
    made = make_adapters(part, flatten(params)[0], boxes_of(params), jax.random.key(0))
    for own in made[LORA].values():
        for name in ("lora_a", "lora_b"):
            own[name] = jax.tree.map(jnp.zeros_like, own[name])
    return made


def _rows_among(tokens: Sequence[int], rows: Any, among: Sequence[int], frozen: Any) -> Any:
    """Returns the rows of tokens in their places among others', which are as they were."""
    places = jnp.array([list(among).index(t) for t in tokens], jnp.int32)
    own = jnp.asarray(unboxed(rows))
    return boxed_as(rows, unboxed(frozen).astype(own.dtype).at[places].set(own))
