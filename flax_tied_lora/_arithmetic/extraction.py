"""`extract`: adapters from the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.fingerprint import raw
from flax_tied_lora._adapters.lowrank import nearest, whole
from flax_tied_lora._adapters.make import DTYPE
from flax_tied_lora._config.checks import reads_weight
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan
from flax_tied_lora._ties.groups import Member
from flax_tied_lora._tree.boxes import in_place, is_box
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.paths import describe, flatten, is_marker, is_tracer
from flax_tied_lora._tree.quantized_array import plain_array
from flax_tied_lora._verbs.wrap import wrap


class LeftOutWarning(UserWarning):
    """`extract` left out what changed between two checkpoints and no target names."""

    __module__ = "flax_tied_lora.arithmetic"


class Extraction(NamedTuple):
    """What `extract` found.

    Attributes:
      adapted: the base with the adapters.
      errors: for each adapter's key how much of its weight's change is left out, as a share of the
        change (Frobenius norms): 0 where all of it is kept, or there was none.
    """

    adapted: Adapted
    errors: dict[str, float]


def extract(
    base_params: Any,
    tuned_params: Any,
    config: LoraConfig,
    *,
    sites: CallSites | None = None,
    ties: Any = "auto",
) -> Extraction:
    """Returns adapters for the difference of two checkpoints, ties kept, and the error left.

    For each group of leaves that the config targets: the factors of its rank whose product is
    closest to the difference, by a singular value decomposition in float32 (of a leaf of more than
    512 rows and columns by a randomised one); of a tied group one pair. Memory is a few times that
    of the largest leaf. Full copies (``modules_to_save``), rows (``trainable_token_indices``) and
    biases are taken as they are. Whatever else changed is left out, with a warning that names it.

    Args:
      base_params: the params before.
      tuned_params: after, with the same leaves; the tied ones each in its place, and equal.
      config, sites, ties: as in `wrap`.

    Raises:
      ValueError: the leaves differ; members of a tie differ in ``tuned_params``; adapters for
        call sites of one leaf, which a checkpoint does not tell apart; DoRA, or factors that
        start from the weight; and all that `wrap` raises.
      TypeError: abstract or wrapped params.

    Example::

      adapted, errors = arithmetic.extract(params, tuned, config)
    """
    _check_config(config)
    base, tuned = _leaves("base_params", base_params), _leaves("tuned_params", tuned_params)
    adapted = wrap(base_params, config, sites=sites, ties=ties)
    _check_leaves(base, tuned)
    adapters = {kind: dict(by_key) for kind, by_key in adapted.adapters.items()}
    left, errors, seen = {}, {}, set()
    for group in adapted.plan.groups:
        for adapter in group.adapters:
            if adapter.span is not None:
                raise ValueError(
                    f"extract: {adapter.key!r} is for a part of {group.key!r}; leave parts out of "
                    "the config: one pair of factors is for all of a leaf then"
                )
            if adapter.sites is not None:
                raise ValueError(
                    f"extract: {adapter.key!r} is for some call sites of {group.key!r} only, and "
                    "a checkpoint has one array for all; leave ensure_weight_tying at None"
                )
        for members in {_covered(group, a): None for a in group.adapters or (None,)}:
            after = _one_array(group, members, tuned)
            seen |= {m.path for m in members} if group.adapters else set()
            fitting = [a for a in group.adapters if _covered(group, a) == members]
            if fitting:
                arrays, error, rest = _fit(group, fitting, _float(base[group.key]), after, adapted)
                for adapter in fitting:
                    old = adapters[adapter.kind][adapter.key]
                    adapters[adapter.kind][adapter.key] = jax.tree.map(
                        in_place, old, arrays[adapter.kind], is_leaf=is_box
                    )
                    errors[adapter.key] = error
                if rest is not None:
                    left[f"{group.key!r} outside its trainable tokens"] = rest
    changes = {repr(p): _change(base[p], tuned[p]) for p in base if p not in seen}
    _warn_of(jax.device_get(left | changes))
    errors = {key: math.sqrt(x) for key, x in jax.device_get(errors).items()}
    return Extraction(dataclasses.replace(adapted, adapters=adapters), errors)


def _check_config(config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise TypeError(f"extract: config is a {type(config).__name__}; expected a LoraConfig")
    if config.use_dora:
        raise ValueError(
            "extract: use_dora=True learns magnitudes, which a difference does not tell apart from "
            "the factors; leave it out"
        )
    if reads_weight(config.init_lora_weights):
        raise ValueError(
            f"extract: init_lora_weights={config.init_lora_weights!r} starts from the weight, and "
            "extracted factors do not; leave it out"
        )


def _leaves(name: str, params: Any) -> dict[str, Any]:
    if isinstance(params, Adapted):
        raise TypeError(f"extract: {name} is an Adapted; expected params, as merge returns them")
    refuse_models("extract", params)
    leaves = flatten(params)[0]
    for path, leaf in leaves.items():
        if is_marker(leaf):
            raise TypeError(
                f"extract: {path!r} in {name} is a marker of a tie group: these are the params of "
                "an Adapted; expected those of base(adapted) or merge(adapted)"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_tracer(leaf):
            raise TypeError(
                f"extract: {path!r} in {name} is {'traced' if is_tracer(leaf) else 'abstract'}; "
                "extract reads the values, so call it outside jax.jit, with arrays"
            )
    return leaves


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape if hasattr(leaf, "shape") else jnp.shape(leaf))


def _check_leaves(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    odd = {
        "missing": [p for p in base if p not in tuned],
        "unknown": [p for p in tuned if p not in base],
    }
    parts = [f"{what} {', '.join(map(repr, p[:3]))}" for what, p in odd.items() if p]
    if parts:
        raise ValueError(
            f"extract: tuned_params are not of the base's leaves: {'; '.join(parts)}; expected the "
            "same model's params"
        )
    for path, leaf in base.items():
        if _shape(leaf) != _shape(tuned[path]):
            raise ValueError(
                f"extract: {path!r} is {describe(tuned[path])} in tuned_params, and "
                f"{describe(leaf)} in base_params"
            )


def _covered(group: GroupPlan, adapter: AdapterPlan | None) -> tuple[Member, ...]:
    return tuple(m for m in group.members if adapter is None or adapter.covers(m.path))


def _float(leaf: Any) -> jax.Array:
    return jnp.asarray(plain_array(leaf)).astype(DTYPE)


def _one_array(group: GroupPlan, members: Sequence[Member], tuned: Mapping[str, Any]) -> jax.Array:
    """Returns what members of a tie group are in the tuned params, in the group's layout.

    Raises:
      ValueError: they differ.
    """

    def of(member: Member) -> jax.Array:
        leaf = raw(plain_array(tuned[member.path]))
        return jnp.asarray(leaf).T if member.transposed else jnp.asarray(leaf)

    first = of(members[0])
    for member in members[1:]:
        other = jax.device_put(of(member), first.sharding)
        if tuned[member.path] is not tuned[members[0].path] and not jnp.array_equal(first, other):
            distance = jnp.max(jnp.abs(first.astype(DTYPE) - other.astype(DTYPE)))
            raise ValueError(
                f"extract: {members[0].path!r} and {member.path!r} are tied in the base "
                f"({', '.join(group.found)}), and differ by up to {float(distance):.3g} in "
                "tuned_params, so no one delta is both's. Tie them there, or take the "
                "tie out of ties=..."
            )
    return first


def _fit(
    group: GroupPlan, adapters: Sequence[AdapterPlan], before: jax.Array, after: jax.Array,
    adapted: Adapted,
) -> tuple[dict[str, Any], Any, Any]:  # fmt: skip
    """Returns the arrays of the adapters of one weight, by kind, and two squared relative norms.

    The first is that of the change that is left out, relative to the change. The second, where only
    some rows are trained, is that of the other rows' change, relative to the weight.
    """
    before, after = whole(before), whole(after, like=before).astype(DTYPE)
    kinds = {a.kind: a for a in adapters}
    if LORA not in kinds and TRAINABLE_TOKENS not in kinds:
        return dict.fromkeys(kinds, jnp.copy(after)), jnp.zeros(()), None
    change, arrays, rest = after - before, {}, None
    total = left = jnp.sum(jnp.square(change))
    if TRAINABLE_TOKENS in kinds:
        # What replaces rows takes all of their change; the factors are for the others.
        tokens = jnp.asarray(kinds[TRAINABLE_TOKENS].tokens)
        rows = (*[slice(None)] * group.token_axis, tokens)
        arrays[TRAINABLE_TOKENS] = jnp.moveaxis(after[rows], group.token_axis, 0)
        change = change.at[rows].set(0)
        left = jnp.sum(jnp.square(change))
    if LORA in kinds:
        arrays[LORA], left, total = _pair(group, kinds[LORA], change, adapted)
    else:
        rest = _ratio(left, jnp.sum(jnp.square(before)))
    return arrays, _ratio(left, total), rest


def _ratio(part: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(part > 0, part / jnp.where(total > 0, total, 1), 0)


def _pair(
    group: GroupPlan, adapter: AdapterPlan, change: jax.Array, adapted: Adapted
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Returns the factors closest to a change; squared norms of what they leave out, and of it."""
    sides = (group.batch, group.rows, group.cols)
    order = [i for axes in sides for i in axes]
    sizes = [math.prod(group.shape[i] for i in axes) for axes in sides]
    matrix = jnp.transpose(change, order).reshape(sizes)
    rng = jax.random.key(key_number(adapter.key))
    a, b, left, total = nearest(matrix, adapter.rank, rng)
    # Half of the scaling is taken out of either factor.
    root = jnp.sqrt(jnp.asarray(adapted.scaling[adapter.key], DTYPE))
    shapes = group.shapes(adapter)
    pair = {
        "lora_a": (a / root).reshape(shapes["lora_a"]),
        "lora_b": (b / root).reshape(shapes["lora_b"]),
    }
    return pair, left, total


def _change(before: Any, after: Any) -> Any:
    """Returns the squared relative change of a leaf; None where it is the same array."""
    if before is after:
        return None
    before = jnp.asarray(raw(plain_array(before)))
    after = jax.device_put(jnp.asarray(raw(plain_array(after))), before.sharding)
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        return jnp.mean((before != after).astype(DTYPE))
    before, after = before.astype(DTYPE), after.astype(DTYPE)
    return _ratio(jnp.sum(jnp.square(after - before)), jnp.sum(jnp.square(before)))


def _warn_of(changes: Mapping[str, Any]) -> None:
    left = {name: math.sqrt(x) for name, x in changes.items() if x is not None and x > 0}
    if not left:
        return
    largest = sorted(left, key=lambda name: -left[name])
    listed = ", ".join(f"{name} (by {100 * left[name]:.2g} %)" for name in largest[:5])
    more = f", and {len(left) - 5} more" if len(left) > 5 else ""
    warnings.warn(
        f"extract: these changed and are not targeted, so what they changed by is left out: "
        f"{listed}{more}",
        LeftOutWarning,
        stacklevel=3,
    )
