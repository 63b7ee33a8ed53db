"""Adapters of several plans in the form of one plan, so that they can be stacked."""

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
    """Returns the plan with the adapters of all, each of its largest rank and with all tokens.

    Args:
      what: what errors call the function.
      plans: of one base. The config is the first one's.
      rank: of all factors, where their matrices can have it.

    Raises:
      ValueError: a weight is adapted in ways that cannot stand side by side.
    """
    groups: dict[str, GroupPlan] = {}
    for group in (g for plan in plans for g in plan.groups):
        groups[group.key] = _united(what, groups.get(group.key, group), group)
    roomy = tuple(
        dataclasses.replace(g, adapters=tuple(_with_room(what, g, a, rank) for a in g.adapters))
        for g in groups.values()
    )
    largest = max((a.rank for g in roomy for a in g.adapters), default=0)
    first = plans[0]
    if roomy == first.groups:
        return first
    config = first.config if not largest else dataclasses.replace(first.config, r=largest)
    return Plan.of(roomy, config)


def _united(what: str, first: GroupPlan, other: GroupPlan) -> GroupPlan:
    """Returns a group with the adapters of both plans, each of the larger rank and all tokens."""
    if not other.adapters or not first.adapters:
        return first if first.adapters else other
    if layout_of(first) != layout_of(other):
        raise ValueError(
            f"{what}: the adapters are of different groups: {first.key!r} has rows {first.rows} "
            f"and columns {first.cols} in one, rows {other.rows} and columns {other.cols} in "
            "another; wrap them with the same sites and ties"
        )
    adapters = {(a.kind, a.key): a for a in first.adapters}
    for adapter in other.adapters:
        earlier = adapters.get((adapter.kind, adapter.key), adapter)
        check_alike(what, earlier, adapter)
        tokens = tuple(dict.fromkeys((*earlier.tokens, *adapter.tokens)))
        adapters[adapter.kind, adapter.key] = dataclasses.replace(
            earlier, rank=max(earlier.rank, adapter.rank), tokens=tokens
        )
    return dataclasses.replace(first, adapters=tuple(adapters.values()))


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


def _with_room(what: str, group: GroupPlan, adapter: AdapterPlan, rank: int | None) -> AdapterPlan:
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
    given, values, scalings = {}, {}, {}
    if adapted is not None:
        _check_room(what, adapted.plan, plan)
        given = {(a.kind, a.key): a for _, a in adapted.plan.adapters()}
        params, values, scalings = adapted.params, adapted.adapters, adapted.scaling
    start = _unadapted(plan, params, [
        a for _, a in plan.adapters()
        if (a.kind, a.key) not in given or given[a.kind, a.key].tokens != a.tokens
    ])  # fmt: skip
    adapters: dict[str, dict[str, Any]] = {LORA: {}}
    for group, adapter in plan.adapters():
        kind, key = adapter.kind, adapter.key
        given_adapter = given.get((kind, key))
        value = start[kind][key] if given_adapter is None else values[kind][key]
        if given_adapter is not None and kind == LORA:
            value = filled(value, len(group.cols), adapter.rank)
        if given_adapter is not None and given_adapter.tokens != adapter.tokens:
            value = _rows_among(given_adapter.tokens, value, adapter.tokens, start[kind][key])
        adapters.setdefault(kind, {})[key] = value
    keys = [a.key for _, a in plan.adapters(LORA)]
    return adapters, {k: scalings[k] if k in scalings else jnp.zeros((), DTYPE) for k in keys}


def _check_room(what: str, given: Plan, plan: Plan) -> None:
    room = {(a.kind, a.key): (g, a) for g, a in plan.adapters()}
    for group, adapter in given.adapters():
        if (adapter.kind, adapter.key) not in room:
            raise ValueError(
                f"{what}: there is no room for {adapter.key!r} ({adapter}); these have it: "
                f"{', '.join(repr(key) for _, key in list(room)[:5])}. Stack it with the others "
                "from the start"
            )
        stack_group, stack_adapter = room[adapter.kind, adapter.key]
        if layout_of(stack_group) != layout_of(group):
            raise ValueError(
                f"{what}: {group.key!r} has rows {group.rows} and columns {group.cols}, in the "
                f"stack rows {stack_group.rows} and columns {stack_group.cols}; wrap it with the "
                "same sites and ties"
            )
        check_alike(what, stack_adapter, adapter)
        if adapter.rank > stack_adapter.rank:
            raise ValueError(
                f"{what}: {adapter.key!r} has rank {adapter.rank}, and there is room for "
                f"{stack_adapter.rank}; make room from the start: tied_lora.stack([...], "
                f"rank={adapter.rank})"
            )
        odd = [t for t in adapter.tokens if t not in stack_adapter.tokens]
        if odd:
            raise ValueError(
                f"{what}: {adapter.key!r} replaces token {odd[0]}, and there is room for tokens "
                f"{list(stack_adapter.tokens)[:10]}; stack it with the others from the start"
            )


def _unadapted(
    plan: Plan, params: Any, adapters: Sequence[AdapterPlan]
) -> Mapping[str, Mapping[str, Any]]:
    """Returns values for some of a plan's adapters with which their weights stay as they are."""
    if not adapters:
        return {}
    groups = tuple(
        dataclasses.replace(g, adapters=tuple(a for a in g.adapters if a in adapters))
        for g in plan.groups
    )
    reduced = Plan.of(groups, plan.config)
    made = make_adapters(reduced, flatten(params)[0], boxes_of(params), jax.random.key(0))
    for factors in made[LORA].values():
        for name in ("lora_a", "lora_b"):
            factors[name] = jax.tree.map(jnp.zeros_like, factors[name])
    return made


def _rows_among(tokens: Sequence[int], rows: Any, among: Sequence[int], frozen: Any) -> Any:
    """Returns the rows of more tokens: those given where they belong, frozen ones elsewhere."""
    places = jnp.array([list(among).index(t) for t in tokens], jnp.int32)
    values = jnp.asarray(unboxed(rows))
    return boxed_as(rows, unboxed(frozen).astype(values.dtype).at[places].set(values))
