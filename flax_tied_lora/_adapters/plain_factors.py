"""`plain`: the same function as factors alone, all of one rank, with nothing to scale them by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted, Params, check_adapted
from flax_tied_lora._adapters.compatible import check_single
from flax_tied_lora._adapters.lowrank import nearest, whole
from flax_tied_lora._adapters.make import DTYPE
from flax_tied_lora._adapters.ranks import filled
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import boxed_as, unboxed
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.paths import flatten, module_of
from flax_tied_lora._tree.quantized_array import plain_array

# A pair of factors in matrix form: [batch, rows, rank] and [batch, rank, cols].
Pair = tuple[jax.Array, jax.Array]


def plain(adapted: Adapted[Params], base_params: Params | None = None) -> Adapted[Params]:
    """Returns the same function as plain factors: one rank, ``lora_alpha == r``, no patterns.

    What readers of ``lora_A`` and ``lora_B`` alone understand. Scalings (rsLoRA, patterns, `scale`)
    are multiplied into ``lora_b``; smaller ranks are filled up with zeros; replaced tokens are
    factors of as many ranks; and factors that started from the weight (PiSSA, OLoRA) are factors of
    twice the rank over the params as they were before.

    Args:
      adapted: as `wrap` returns it, of one slot.
      base_params: what was given to `wrap`, where the factors started from the weight.

    Returns:
      An `Adapted` over the base params, factors float32, their scaling 1.

    Raises:
      ValueError: DoRA, full copies or biases, which no factors are (`save_merged` writes a model;
        `extract` finds the closest factors); ``base_params`` are missing, or are not those of
        before; stacked or abstract adapters.
      TypeError: not an `Adapted`.

    Example::

      save_adapter("served", arithmetic.plain(adapted), names)
    """
    check_adapted("plain", adapted)
    check_single("plain", adapted)
    _refuse_others(adapted)
    leaves, treedef = flatten(adapted.params)
    before = None if base_params is None else flatten(base_params)[0]
    groups, pairs = [], {}
    for group in adapted.plan.groups:
        plans: list[AdapterPlan] = []
        stored = leaves[group.key]
        for adapter in _shares(group):
            pair = _pair(adapted, group, adapter)
            if adapter.residual:
                pair, leaves[group.key] = _over(before, stored, group, adapter, pair)
            pair = _with_tokens(adapted, group, adapter, leaves[group.key], pair)
            pairs[adapter.key] = group, adapter, pair
            plans.append(adapter)
        groups.append((group, plans))
    rank = max((pair[0].shape[-1] for _, _, pair in pairs.values()), default=1)
    new_groups, lora = [], {}
    for group, plans in groups:
        new = [
            dataclasses.replace(a, kind=LORA, rank=rank, residual=False, tokens=()) for a in plans
        ]
        new_groups.append(dataclasses.replace(group, adapters=tuple(new)))
        for old, adapter in zip(plans, new, strict=True):
            lora[adapter.key] = _arrays(adapted, group, old, adapter, pairs[old.key][2])
    scaling = jax.device_put({key: np.ones((), DTYPE) for key in lora})
    return dataclasses.replace(
        adapted,
        params=jax.tree.unflatten(treedef, list(leaves.values())),
        adapters={LORA: lora},
        scaling=scaling,
        plan=Plan.of(tuple(new_groups), _config(adapted, new_groups, rank)),
    )


def _refuse_others(adapted: Adapted) -> None:
    for group, adapter in adapted.plan.adapters():
        if adapter.dora:
            what = "is DoRA (use_dora), whose magnitude is no part of a delta"
        elif adapter.kind not in (LORA, TRAINABLE_TOKENS):
            what = f"is trained in full ({adapter.kind}), which no factors of {group.key!r} are"
        else:
            continue
        raise ValueError(
            f"plain: {adapter.key!r} {what}; peft.save_merged writes a model, and "
            "arithmetic.extract(params, merge(adapted), config) finds the closest factors"
        )


def _shares(group: GroupPlan) -> list[AdapterPlan]:
    """Returns the adapters of a group that have factors of their own in the plain form.

    Raises:
      ValueError: replaced rows and factors of one group are for different call sites.
    """
    factors = [a for a in group.adapters if a.kind == LORA]
    for tokens in (a for a in group.adapters if a.kind == TRAINABLE_TOKENS):
        same = [a for a in factors if _share(a) == _share(tokens)]
        if same:
            continue
        if any(a.kind == LORA for a in group.adapters):
            raise ValueError(
                f"plain: {tokens.key!r} replaces rows at other call sites of {group.key!r} than "
                "its factors are for; wrap them with the same ensure_weight_tying, without parts"
            )
        factors.append(dataclasses.replace(tokens, module=module_of(group.key)))
    return factors


def _share(adapter: AdapterPlan) -> tuple[Any, ...]:
    return adapter.members, adapter.sites, adapter.span


def _sizes(group: GroupPlan, adapter: AdapterPlan) -> tuple[int, int, int]:
    shape = group.shape_of(adapter)
    batch, rows, cols = (
        math.prod(shape[i] for i in axes) for axes in (group.batch, group.rows, group.cols)
    )
    return batch, rows, cols


def _matrix(group: GroupPlan, adapter: AdapterPlan, leaf: Any) -> jax.Array:
    """Returns a leaf, or the part of it that an adapter is for, as [batch, rows, cols]."""
    array = jnp.asarray(plain_array(leaf)).astype(DTYPE)
    if adapter.span is not None:
        axis, start, stop = adapter.span
        array = array[(*[slice(None)] * axis, slice(start, stop))]
    order = (*group.batch, *group.rows, *group.cols)
    return whole(jnp.transpose(array, order).reshape(_sizes(group, adapter)))


def _pair(adapted: Adapted, group: GroupPlan, adapter: AdapterPlan) -> Pair:
    """Returns factors with their scaling in the second; of replaced rows alone there are none."""
    batch, rows, cols = _sizes(group, adapter)
    if adapter.kind != LORA:
        return jnp.zeros((batch, rows, 0), DTYPE), jnp.zeros((batch, 0, cols), DTYPE)
    arrays = adapted.adapters[LORA][adapter.key]
    a, b = (
        whole(jnp.asarray(unboxed(arrays[name])).astype(DTYPE)) for name in ("lora_a", "lora_b")
    )
    scaling = jnp.asarray(adapted.scaling[adapter.key], DTYPE)
    return (
        a.reshape(batch, rows, adapter.rank),
        scaling * b.reshape(batch, adapter.rank, cols),
    )


def _over(
    before: Any, residual: Any, group: GroupPlan, adapter: AdapterPlan, pair: Pair
) -> tuple[Pair, Any]:
    """Returns factors over the weight as it was, and that weight's leaf.

    Raises:
      ValueError: it was not given, or differs from the residual by more than the factors' start.
    """
    what = f"plain: {adapter.key!r} started from the weight, and {group.key!r} is a residual"
    if before is None:
        raise ValueError(f"{what}; pass base_params=, the params that you gave to wrap")
    found = before.get(group.key)
    if found is None or tuple(getattr(found, "shape", ())) != group.shape:
        shown = "nothing" if found is None else f"{list(getattr(found, 'shape', ()))}"
        raise ValueError(
            f"{what}; found {shown} there in base_params, expected {list(group.shape)}: the params "
            "that you gave to wrap"
        )
    stored, first = (_matrix(group, adapter, x) for x in (residual, found))
    a, b, left, _ = nearest(first - stored, adapter.rank, jax.random.key(key_number(adapter.key)))
    rounding = 4 * float(jnp.finfo(jnp.dtype(group.dtype)).eps) * float(jnp.linalg.norm(first))
    if not math.sqrt(float(left)) <= rounding:
        raise ValueError(
            f"{what}; base_params differ from it by more than rank {adapter.rank}: expected the "
            "params that you gave to wrap"
        )
    return (jnp.concatenate([pair[0], -a], -1), jnp.concatenate([pair[1], b], -2)), found


def _with_tokens(
    adapted: Adapted, group: GroupPlan, adapter: AdapterPlan, stored: Any, pair: Pair
) -> Pair:
    """Returns factors with one rank more for each row that is replaced where they are read."""
    for tokens in group.adapters:
        if tokens.kind != TRAINABLE_TOKENS or _share(tokens) != _share(adapter):
            continue
        values = jnp.asarray(unboxed(adapted.adapters[TRAINABLE_TOKENS][tokens.key])).astype(DTYPE)
        values, picked = values.reshape(len(tokens.tokens), -1), jnp.asarray(tokens.tokens)
        a, b = pair  # these are added to replaced rows as to others
        matrix = _matrix(group, adapter, stored)
        hot = jax.nn.one_hot(picked, group.shape[group.token_axis], dtype=DTYPE)
        if group.is_table:
            left, right = hot.T, values - matrix[0, picked]
        else:
            left, right = values.T - matrix[0][:, picked], hot
        pair = jnp.concatenate([a, left[None]], -1), jnp.concatenate([b, right[None]], -2)
    return pair


def _arrays(
    adapted: Adapted, group: GroupPlan, old: AdapterPlan, new: AdapterPlan, pair: Pair
) -> dict[str, Any]:
    """Returns an adapter's arrays at the rank of all, boxed as its factors were."""
    shapes = group.shapes(dataclasses.replace(new, rank=pair[0].shape[-1]))
    arrays = {
        name: array.reshape(shapes[name])
        for name, array in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    arrays = filled(arrays, len(group.cols), new.rank)
    if old.kind != LORA:
        return arrays
    boxes = adapted.adapters[LORA][old.key]
    return {name: boxed_as(boxes[name], array) for name, array in arrays.items()}


def _config(adapted: Adapted, groups: Sequence[GroupPlan], rank: int) -> Any:
    """Returns a config that says what is left to say: which modules, and their rank."""
    names = [
        name
        for group in groups
        for adapter in group.adapters
        for name in (adapter.targets if adapter.separate else (module_of(group.key) or group.key,))
    ]
    return dataclasses.replace(
        adapted.plan.config,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        target_modules=tuple(dict.fromkeys(names)) or None,
        target_parameters=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        trainable_token_indices=None,
        bias="none",
    )
