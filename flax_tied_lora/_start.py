"""Factors that start from the weight: what they start with is taken out of the frozen params."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._factors import key_number, unboxed
from flax_tied_lora._fused import cut, pasted
from flax_tied_lora._init import from_weight, orthogonal
from flax_tied_lora._paths import is_tracer
from flax_tied_lora._plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._quantized_array import is_quantized
from flax_tied_lora._sharding import replicated


def start_from_weights(
    plan: Plan, adapters: dict[str, Any], leaves: Mapping[str, Any],
    scalings: Mapping[str, float], rng: jax.Array,
) -> tuple[dict[str, Any], Mapping[str, Any]]:  # fmt: skip
    """Returns the adapters and the params after ``init_lora_weights`` that factors go by.

    Args:
      adapters: as `make_adapters` made them.
      leaves: the params, by path.
      scalings: of the factors, by key.
      rng: each adapter's key is folded into it.

    Raises:
      TypeError, ValueError: as `_init.from_weight`; or the weight is stored quantised.
    """
    how = plan.config.init_lora_weights
    # Tables start as ever: PEFT's embeddings know no other initialisation.
    chosen = [
        (g, a) for g, a in plan.adapters(LORA)
        if (a.residual or (how == "orthogonal" and not g.is_table))
        and not isinstance(leaves[g.key], jax.ShapeDtypeStruct)
    ]  # fmt: skip
    if not chosen:
        return adapters, leaves
    for group, adapter in chosen:
        if adapter.residual and is_quantized(unboxed(leaves[group.key])):
            raise ValueError(
                f"wrap: init_lora_weights={how!r} takes the first values of the factors out of "
                f"{group.key!r}, which is stored quantised; wrap the floating-point params, then "
                "quantize(adapted)"
            )
    leaves, lora = dict(leaves), dict(adapters[LORA])
    for group, adapter in chosen:
        key = jax.random.fold_in(rng, key_number(f"{adapter.key}/start"))
        box, leaf = leaves[group.key], unboxed(leaves[group.key])
        a, b, residual = _start(str(how), group, adapter, leaf, scalings[adapter.key], key)
        own = dict(lora[adapter.key])
        own["lora_a"], own["lora_b"] = in_place(own["lora_a"], a), in_place(own["lora_b"], b)
        lora[adapter.key] = own
        if adapter.residual:
            leaves[group.key] = in_place(box, residual)
    return {**adapters, LORA: lora}, leaves


def in_place(old: Any, array: jax.Array) -> Any:
    """Returns an array boxed and placed as the one that it comes in the place of."""
    if not is_tracer(array):  # a tracer takes long to say that it is placed nowhere
        sharding = getattr(unboxed(old), "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            array = jax.device_put(array, sharding)
    return old.replace_boxed(array) if hasattr(old, "replace_boxed") else array


def _start(
    how: str, group: GroupPlan, adapter: AdapterPlan, leaf: Any, scaling: float, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns ``lora_a``, ``lora_b`` and the residual in the leaf's own layout."""
    shapes = group.shapes(adapter)
    order = (*group.batch, *group.rows, *group.cols)
    sides = group.batch, group.rows, group.cols
    shape = group.shape_of(adapter)
    size = [math.prod(shape[i] for i in axes) for axes in sides]
    keys = jax.random.split(key, size[0])
    if not adapter.residual:
        make = functools.partial(orthogonal, rows=size[1], cols=size[2], rank=adapter.rank)
        a, b = jax.vmap(make)(keys)
        return a.reshape(shapes["lora_a"]), b.reshape(shapes["lora_b"]), None
    whole = replicated(jnp.asarray(leaf))
    matrices = jnp.transpose(cut(whole, adapter.span), order).reshape(size)
    make = functools.partial(_one, how, adapter.rank, scaling, group.key)
    a, b, rest = jax.vmap(make)(matrices, keys)
    rest = rest.reshape([shape[i] for i in order])
    rest = jnp.transpose(rest, [order.index(i) for i in range(len(order))])
    rest = pasted(whole, rest.astype(whole.dtype), adapter.span)
    return a.reshape(shapes["lora_a"]), b.reshape(shapes["lora_b"]), rest


def _one(how: str, rank: int, scaling: float, leaf: str, matrix: Any, key: Any) -> Any:
    return from_weight(how, matrix, rank, scaling, key, leaf=f"{leaf!r}")
