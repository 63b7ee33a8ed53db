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
from flax_tied_lora._adapters.make import DTYPE
from flax_tied_lora._adapters.ranks import with_patterns
from flax_tied_lora._arithmetic.lowrank import compressed, whole
from flax_tied_lora._config.axes_and_parts import OWN_FIELDS
from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.all_linear import ALL_LINEAR
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import in_place, unboxed
from flax_tied_lora._tree.paths import flatten, is_tracer

_HOW = ("linear", "cat", "svd")
# The fields that say what is adapted. Of the targets a union can be made, of the others none.
_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying")


@dataclasses.dataclass(frozen=True)
class _Part:
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
    first, parts = adapteds[0], _parts(adapteds, weights)
    targets = _targets([a.plan.config for a in adapteds])
    joined, groups, lora = targets["target_modules"], [], {}
    regexes = {str(a.plan.config.target_modules): str(joined) for a in adapteds}
    for group in _groups(adapteds):
        plans = []
        for key in [k for k in parts if k[0] == group.key]:
            own = parts[key]
            adapter = _planned(group, own, how, rank, regexes)
            lora[adapter.key] = _factors(group, adapter, own, how)
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


def _parts(
    adapteds: Sequence[Adapted], weights: Sequence[Any]
) -> dict[tuple[str, str], list[_Part]]:
    """Returns what is added up for each adapter, by the keys of its group and its own."""
    parts: dict[tuple[str, str], list[_Part]] = {}
    for adapted, weight in zip(adapteds, weights, strict=True):
        for group, adapter in adapted.plan.adapters(LORA):
            scale = jnp.asarray(weight, DTYPE) * jnp.asarray(adapted.scaling[adapter.key], DTYPE)
            pair = adapted.adapters[LORA][adapter.key]
            parts.setdefault((group.key, adapter.key), []).append(_Part(adapter, pair, scale))
    return parts


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
    group: GroupPlan, parts: Sequence[_Part], how: str, rank: int | None, regexes: Mapping[str, str]
) -> AdapterPlan:
    """Returns the plan of the sum of parts; of targets that are a regex the union has another."""
    first, ranks = parts[0].plan, [p.plan.rank for p in parts]
    for part in parts[1:]:
        if any(getattr(part.plan, f) != getattr(first, f) for f in ("members", "sites", "span")):
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
    found = {"linear": ranks[0], "cat": min(sum(ranks), limit), "svd": rank or max(ranks)}[how]
    named = tuple(dict.fromkeys(regexes.get(t, t) for p in parts for t in p.plan.targets))
    return dataclasses.replace(first, rank=found, targets=named)


def _factors(
    group: GroupPlan, adapter: AdapterPlan, parts: Sequence[_Part], how: str
) -> dict[str, Any]:
    """Returns the factors of the sum of parts, boxed as the first part's."""
    batch, rows, cols = (
        math.prod(group.shape_of(adapter)[i] for i in axes)
        for axes in (group.batch, group.rows, group.cols)
    )
    a = [_array(p.pair["lora_a"]).reshape(batch, rows, p.plan.rank) for p in parts]
    b = [_array(p.pair["lora_b"]).reshape(batch, p.plan.rank, cols) for p in parts]
    if how == "linear":
        # The sign goes to one side only: on both it would be lost.
        roots = [jnp.sqrt(jnp.abs(p.weight)) for p in parts]
        signs = [jnp.where(p.weight < 0, -1, 1).astype(DTYPE) for p in parts]
        left = sum(s * r * x for s, r, x in zip(signs, roots, a, strict=True))
        right = sum(r * x for r, x in zip(roots, b, strict=True))
    else:
        left = jnp.concatenate([p.weight * x for p, x in zip(parts, a, strict=True)], axis=-1)
        right = jnp.concatenate(b, axis=-2)
        if left.shape[-1] != adapter.rank or how == "svd":
            left, right = compressed(whole(left), whole(right), adapter.rank)
    shapes, first = group.shapes(adapter), parts[0].pair
    return {
        name: in_place(
            first[name], jnp.asarray(x).reshape(shapes[name]).astype(unboxed(first[name]).dtype)
        )
        for name, x in (("lora_a", left), ("lora_b", right))
    }


def _array(factor: Any) -> jax.Array:
    return jnp.asarray(unboxed(factor)).astype(DTYPE)


def _union(field: str, mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, value in (item for m in mappings for item in m.items()):
        if found.setdefault(pattern, value) != value:
            raise ValueError(
                f"combine: {field} of {pattern!r} is {found[pattern]} in one config and {value} in "
                "another; wrap the adapters with the same"
            )
    return found


def _targets(configs: Sequence[LoraConfig]) -> dict[str, Any]:
    """Returns the fields by which a config targets what any of several does.

    Raises:
      ValueError: there is no such config.
    """
    targets = [c.target_modules for c in configs]
    parameters = tuple(dict.fromkeys(p for c in configs for p in as_tuple(c.target_parameters)))
    found = {"target_modules": targets[0], "target_parameters": parameters or None}
    found |= {field: _union(field, [getattr(c, field) for c in configs]) for field in OWN_FIELDS}
    fields = [*_WHERE, "target_modules"]
    different = [f for f in fields if any(getattr(c, f) != getattr(configs[0], f) for c in configs)]
    if not different:
        return found
    regexes = [isinstance(t, str) and t.lower() != ALL_LINEAR for t in targets]
    if different == ["target_modules"] and all(regexes):
        joined = "|".join(f"({t})" for t in dict.fromkeys(targets))
        return found | {"target_modules": joined}
    if different == ["target_modules"] and not any(isinstance(t, str) for t in targets):
        union = dict.fromkeys(name for t in targets for name in as_tuple(t))
        return found | {"target_modules": tuple(union) or None}
    values = " and ".join(dict.fromkeys(repr(getattr(c, different[0])) for c in configs))
    raise ValueError(
        f"combine: the configs have different {different[0]}, {values}, and no config says what "
        "any of them does; wrap the adapters with the same one (of target_modules, lists or "
        "regexes may differ)"
    )
