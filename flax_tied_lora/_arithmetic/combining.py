"""`combine`: a weighted sum of adapters as one adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted, check_adapted
from flax_tied_lora._adapters.compatible import (
    check_same_base,
    check_single,
    layout_of,
    refuse_residual,
)
from flax_tied_lora._adapters.lowrank import compressed, whole
from flax_tied_lora._adapters.make import DTYPE
from flax_tied_lora._adapters.ranks import with_patterns
from flax_tied_lora._arithmetic.united_targets import united_targets
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import in_place, unboxed
from flax_tied_lora._tree.paths import flatten, is_tracer

_HOW = ("linear", "cat", "svd")


@dataclasses.dataclass(frozen=True)
class _Summand:
    """An adapter's share of a sum: its factors, and what they are multiplied with."""

    plan: AdapterPlan
    pair: Mapping[str, Any]
    weight: Any


def combine(
    adapteds: Sequence[Adapted],
    weights: Sequence[Any],
    how: Literal["linear", "cat", "svd"] = "svd",
    rank: int | None = None,
) -> Adapted:
    """Returns one adapter that stands for the weighted sum of several over the same base.

    Follows ``add_weighted_adapter`` of ``peft.tuners.lora.model.LoraModel``. An adapter that lacks
    a group adds nothing there. The result's scaling is 1 (its alpha is its rank, without rsLoRA)
    and its config says so; what the config says besides is the first one's.

    Args:
      adapteds: as `wrap` returns them, of one base.
      weights: a number for each, negative ones too.
      how: ``"cat"``: the factors side by side; the exact sum, of the sum of the ranks (of no
        more than the matrix can have, which holds every sum). ``"svd"``: the closest to the sum
        that a rank can be; the sum itself is never made. ``"linear"``: the factors are added up,
        each multiplied with the square root of its weight and scaling; fast and rough, since the
        product of sums has cross terms. All ranks of a group must be equal.
      rank: for ``"svd"``, default the largest rank of each group.

    Raises:
      ValueError: none given, another number of weights, different bases or ties, stacked adapters;
        DoRA; what is no delta (``modules_to_save``, ``trainable_tokens``, ``bias``, factors that
        start from the weight); configs whose targets have no union; unequal ranks for
        ``"linear"``, or a rank that the matrix cannot have.
      TypeError: not a list of `Adapted`, or of the wrong type otherwise.

    Example::

      both = arithmetic.combine([polite, legal], [0.7, 0.3], how="cat")
    """
    _check(adapteds, weights, how, rank)
    first, summands = adapteds[0], _summands(adapteds, weights)
    targets = united_targets([a.plan.config for a in adapteds])
    joined, groups, lora = targets["target_modules"], [], {}
    regexes = {str(a.plan.config.target_modules): str(joined) for a in adapteds}
    for group in _groups(adapteds):
        plans = []
        for key in [k for k in summands if k[0] == group.key]:
            summed = summands[key]
            adapter = _planned(group, summed, how, rank, regexes)
            lora[adapter.key] = _factors(group, adapter, summed, how)
            plans.append(adapter)
        groups.append(dataclasses.replace(group, adapters=tuple(plans)))
    factors = [a for g in groups for a in g.adapters]
    alphas = {a.key: a.rank for a in factors}
    config = with_patterns(
        "combine", first.plan.config, factors, alphas, use_rslora=False, **targets
    )
    scaling = jax.device_put({a.key: np.ones((), DTYPE) for a in factors})
    return dataclasses.replace(
        first, adapters={LORA: lora}, scaling=scaling, plan=Plan.of(tuple(groups), config)
    )


def _check(adapteds: Any, weights: Any, how: Any, rank: Any) -> None:
    if isinstance(adapteds, Adapted) or not isinstance(adapteds, Sequence):
        raise TypeError(
            f"combine: adapteds is a {type(adapteds).__name__}; expected a list of Adapted"
        )
    if not adapteds:
        raise ValueError("combine: expected at least one Adapted")
    if not isinstance(weights, Sequence | np.ndarray | jax.Array) or isinstance(weights, str):
        raise TypeError(
            f"combine: weights is a {type(weights).__name__}; expected a list of numbers"
        )
    if len(weights) != len(adapteds):
        raise ValueError(
            f"combine: {len(weights)} weights for {len(adapteds)} adapters; expected one for each"
        )
    for weight in weights:
        check_number("combine: a weight", weight)
    if how not in _HOW:
        raise ValueError(f"combine: how={how!r}; expected one of {', '.join(map(repr, _HOW))}")
    if rank is not None and (how != "svd" or isinstance(rank, bool) or not isinstance(rank, int)):
        raise ValueError(
            f"combine: rank={rank!r} with how={how!r}; expected an int, with how='svd' only: the "
            "others' rank follows from the adapters"
        )
    for adapted in adapteds:
        check_adapted("combine", adapted)
        check_single("combine", adapted)
        _refuse_no_delta(adapted)
    for other in adapteds[1:]:
        check_same_base("combine", adapteds[0], other)


def check_number(what: str, value: Any) -> None:
    """Refuses what is no finite number; a traced one is taken on trust.

    Raises:
      TypeError, ValueError: it is none.
    """
    if is_tracer(value):
        return
    if not jnp.issubdtype(jnp.result_type(value), jnp.number) if hasattr(value, "dtype") else (
        isinstance(value, bool) or not isinstance(value, int | float)
    ):  # fmt: skip
        raise TypeError(f"{what} is {value!r}; expected a number")
    if not np.all(np.isfinite(np.asarray(value, np.float64))):
        raise ValueError(f"{what} is {value!r}; expected a finite number")


def _refuse_no_delta(adapted: Adapted) -> None:
    for _, adapter in adapted.plan.adapters():
        if adapter.kind != LORA:
            raise ValueError(
                f"combine: {adapter.key!r} is trained in {adapter.kind}, which is no low-rank "
                "delta and cannot be added up; combine adapters without it"
            )
        if adapter.dora:
            raise ValueError(
                f"combine: {adapter.key!r} is DoRA (use_dora), whose magnitude cannot be added up; "
                "arithmetic.extract(params, merge(adapted), config) makes a plain delta of it"
            )
    refuse_residual("combine", adapted)


def _summands(
    adapteds: Sequence[Adapted], weights: Sequence[Any]
) -> dict[tuple[str, str], list[_Summand]]:
    """Returns the summands of each adapter, by the key of its group and that of the adapter."""
    summands: dict[tuple[str, str], list[_Summand]] = {}
    for adapted, weight in zip(adapteds, weights, strict=True):
        for group, adapter in adapted.plan.adapters(LORA):
            scale = jnp.asarray(weight, DTYPE) * jnp.asarray(adapted.scaling[adapter.key], DTYPE)
            pair = adapted.adapters[LORA][adapter.key]
            summands.setdefault((group.key, adapter.key), []).append(_Summand(adapter, pair, scale))
    return summands


def _groups(adapteds: Sequence[Adapted]) -> list[GroupPlan]:
    """Returns the groups of all plans, in the order in which `wrap` has them."""
    groups: dict[str, GroupPlan] = {}
    for group in (g for a in adapteds for g in a.plan.groups):
        before = groups.get(group.key)
        if before is None or not before.adapters:
            groups[group.key] = group
        elif group.adapters and layout_of(before) != layout_of(group):
            raise ValueError(
                f"combine: {group.key!r} is not the same group in all: "
                f"{_described(before)} in one, {_described(group)} in another; wrap them with the "
                "same ties and sites"
            )
    place = {path: i for i, path in enumerate(flatten(adapteds[0].params)[0])}

    def order(group: GroupPlan) -> tuple[bool, int]:
        return not group.found, min(place.get(m.path, 0) for m in group.members)

    return sorted(groups.values(), key=order)


def _described(group: GroupPlan) -> str:
    members = " = ".join(m.path for m in group.members)
    return f"{members} {list(group.shape)} with rows {group.rows}, columns {group.cols}"


def _planned(
    group: GroupPlan, summands: Sequence[_Summand], how: str, rank: int | None,
    regexes: Mapping[str, str],
) -> AdapterPlan:  # fmt: skip
    """Returns the plan of a sum.

    Args:
      regexes: of targets that are a regex, the one that takes its place in the united config.
    """
    first, ranks = summands[0].plan, [p.plan.rank for p in summands]
    for summand in summands[1:]:
        if any(getattr(summand.plan, f) != getattr(first, f) for f in ("members", "sites", "span")):
            raise ValueError(
                f"combine: {first.key!r} is for different call sites or parts in the adapters; "
                "wrap them with the same targets, parts and ensure_weight_tying"
            )
    if how == "linear" and len(set(ranks)) > 1:
        raise ValueError(
            f"combine: how='linear' adds up factors of one rank, and {first.key!r} has the ranks "
            f"{ranks}; use how='cat' or how='svd', or arithmetic.padded"
        )
    limit = group.rank_limit(first)
    if rank is not None and not 1 <= rank <= limit:
        raise ValueError(
            f"combine: rank={rank} for {first.key!r} {list(group.shape)}; expected 1 to {limit}"
        )
    new = {"linear": ranks[0], "cat": min(sum(ranks), limit), "svd": rank or max(ranks)}[how]
    named = tuple(dict.fromkeys(regexes.get(t, t) for p in summands for t in p.plan.targets))
    return dataclasses.replace(first, rank=new, targets=named)


def _factors(
    group: GroupPlan, adapter: AdapterPlan, summands: Sequence[_Summand], how: str
) -> dict[str, Any]:
    """Returns the factors of a sum, boxed as the first summand's."""
    batch, rows, cols = (
        math.prod(group.shape_of(adapter)[i] for i in axes)
        for axes in (group.batch, group.rows, group.cols)
    )
    a = [_array(p.pair["lora_a"]).reshape(batch, rows, p.plan.rank) for p in summands]
    b = [_array(p.pair["lora_b"]).reshape(batch, p.plan.rank, cols) for p in summands]
    if how == "linear":
        # The sign goes to one side only: on both it would be lost.
        roots = [jnp.sqrt(jnp.abs(p.weight)) for p in summands]
        signs = [jnp.where(p.weight < 0, -1, 1).astype(DTYPE) for p in summands]
        left = sum(s * r * x for s, r, x in zip(signs, roots, a, strict=True))
        right = sum(r * x for r, x in zip(roots, b, strict=True))
    else:
        left = jnp.concatenate([p.weight * x for p, x in zip(summands, a, strict=True)], axis=-1)
        right = jnp.concatenate(b, axis=-2)
        if left.shape[-1] != adapter.rank or how == "svd":
            left, right = compressed(whole(left), whole(right), adapter.rank)
    shapes, first = group.shapes(adapter), summands[0].pair
    return {
        name: in_place(
            first[name], jnp.asarray(x).reshape(shapes[name]).astype(unboxed(first[name]).dtype)
        )
        for name, x in (("lora_a", left), ("lora_b", right))
    }


def _array(factor: Any) -> jax.Array:
    return jnp.asarray(unboxed(factor)).astype(DTYPE)
