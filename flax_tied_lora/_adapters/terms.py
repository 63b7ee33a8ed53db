"""The symbolic weights of an `Adapted`: each adapter of its plan as a term."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._adapters import dora
from flax_tied_lora._adapters.adapted import Adapted, check_slots
from flax_tied_lora._adapters.spans import block
from flax_tied_lora._algebra.factor import Factor
from flax_tied_lora._algebra.quantized import frozen
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.term import Dense, LowRank, Term
from flax_tied_lora._algebra.weight import Origin, Weight
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan
from flax_tied_lora._ties.groups import Member
from flax_tied_lora._tree.boxes import is_box, unboxed
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.paths import is_tracer
from flax_tied_lora._tree.quantized_array import is_quantized


def weights_of(adapted: Adapted, leaves: Mapping[str, Any], dtype: Any = None) -> dict[str, Weight]:
    """Returns the symbolic weight of every member of every adapted group, by leaf path.

    Args:
      leaves: the params, by path.
      dtype: of copies; by default the leaf's.

    Raises:
      ValueError: the adapters are stacked, and not one of them is selected; or they are not there.
    """
    _check_there(adapted)
    weights = {}
    adapted, present = _selected(adapted)
    for group in adapted.plan.adapted:
        leaf = leaves[group.key]
        array = leaf if is_quantized(leaf) else jnp.asarray(leaf)
        terms, scale = {}, None
        if parts := [a for a in group.adapters if a.span is not None]:
            terms[parts[0]] = _parts_term(adapted, group, parts)
        for adapter in group.adapters:
            if adapter.span is not None:
                continue
            arrays = adapted.adapters[adapter.kind][adapter.key]
            terms[adapter] = _term(adapted, group, adapter, arrays, array, dtype, present)
            if adapter.dora:
                scale = dora.scale(array, terms[adapter], arrays, group)
                if present is not None:
                    scale = Factor(jnp.where(present, scale.array, 1), scale.axes)
        for member in group.members:
            weights[member.path] = _member(member, array, terms, scale)
    return weights


def quantized_weights(
    adapted: Adapted, leaves: Mapping[str, Any], known: Collection[str] = ()
) -> dict[str, Weight]:
    """Returns the weights of leaves that are stored quantised and have no adapter, by leaf path.

    Args:
      leaves: the params, by path.
      known: paths to leave out.
    """
    ties = {m.path: (group.key, m) for group in adapted.plan.groups for m in group.members}
    weights = {}
    for path in leaves:
        key, member = ties.get(path, (path, Member(path)))
        if path not in known and is_quantized(leaves[key]):
            weights[path] = _member(member, leaves[key], {}, None)
    return weights


def _check_there(adapted: Adapted) -> None:
    if adapted.adapters is None:
        raise ValueError(
            "adapt: this Adapted has no adapters: it is the frozen half that split returns. Use "
            "tied_lora.combine(adapters, frozen)"
        )
    leaves = jax.tree.leaves(adapted.adapters)
    if any(x.is_deleted() for x in leaves if isinstance(x, jax.Array) and not is_tracer(x)):
        raise ValueError(
            "adapt: the adapters of this Adapted were donated to a training step, which had their "
            "memory for the new ones. Use the Adapted that it returned, or keep this one by "
            "train.step(..., donate=False)"
        )


def _selected(adapted: Adapted) -> tuple[Adapted, jax.Array | None]:
    """Returns the adapters of a slot, and whether it is one of the slots; None without slots.

    Those of a slot that is not there are zeros: no delta, whose scaling is 0 too. What is not added
    to the weight (copies, replaced rows, DoRA's scale) is to be left out by the caller.

    Under `jax.vmap` over slots nothing is stacked again: each array is gathered where it is used.
    """
    slot = adapted.slot
    check_slots(
        "adapt",
        adapted,
        "of stacked adapters one serves a call, tied_lora.select(stacked, 0); or one each example, "
        "by tied_lora.per_example, or jax.vmap with tied_lora.adapter_axes",
        stacked=slot is not None,
    )
    if slot is None:
        return adapted, None
    if jnp.ndim(slot) != 0:
        raise ValueError(
            f"adapt: an adapter is selected for each of {list(jnp.shape(slot))} examples, and the "
            "call is not mapped over them; use tied_lora.per_example(adapt(fn)), or jax.vmap with "
            "tied_lora.adapter_axes(selected)"
        )
    count = max((x.shape[0] for x in jax.tree.leaves(adapted.scaling)), default=0)
    count = count or jax.tree.leaves(adapted.adapters)[0].shape[0]

    # A slot that is not there serves nobody's adapter: not what its neighbour has, NaN or not.
    present = (slot >= 0) & (slot < count)

    def of_slot(array: Any) -> Any:
        picked = lax.dynamic_index_in_dim(jnp.asarray(unboxed(array)), slot, keepdims=False)
        return jnp.where(present, picked, 0)

    both = adapted.adapters, adapted.scaling
    adapters, scaling = jax.tree.map(of_slot, both, is_leaf=is_box)
    one = dataclasses.replace(adapted, adapters=adapters, scaling=scaling, slot=None)
    return one, present


def _term(
    adapted: Adapted, group: GroupPlan, adapter: AdapterPlan, arrays: Any, table: Any,
    dtype: Any, present: jax.Array | None,
) -> Term:  # fmt: skip
    """Returns an adapter as a term, in the layout of the group's canonical leaf."""
    if adapter.kind == TRAINABLE_TOKENS:
        rows = jnp.asarray(unboxed(arrays))
        term = Rows.replacing(
            adapter.tokens, rows, table, group.token_axis, adapter.key, adapter.sites
        )
        if present is None:
            return term
        values = Factor(jnp.where(present, term.values.array, 0), term.values.axes)
        return dataclasses.replace(term, values=values)
    if adapter.kind != LORA:
        kind = dtype or table.dtype
        copy = lax.convert_element_type(jnp.asarray(unboxed(arrays)), kind)
        if present is not None:
            copy = jnp.where(present, copy, frozen(table).dense(tuple(table.shape), kind))
        return Dense.of(copy, adapter.key, adapter.sites)
    a, b = _pair(group, adapter, arrays)
    scaling = jnp.asarray(adapted.scaling[adapter.key])
    key, rate = _dropout(adapted, adapter.key)
    return LowRank(a, b, scaling, key, adapter.key, adapter.sites, rate)


def _pair(group: GroupPlan, adapter: AdapterPlan, arrays: Any) -> tuple[Factor, Factor]:
    axes = group.axes(adapter)
    a, b = (Factor(jnp.asarray(unboxed(arrays[name])), axes[name]) for name in ("lora_a", "lora_b"))
    return a, b


def _dropout(adapted: Adapted, key: str) -> tuple[jax.Array | None, float]:
    """Returns an adapter's random key and rate, if dropout is on."""
    rate = float(adapted.plan.config.lora_dropout)
    if not rate or adapted.rng is None:
        return None, 0.0
    return jax.random.fold_in(adapted.rng, key_number(key)), rate


def _parts_term(adapted: Adapted, group: GroupPlan, parts: Sequence[AdapterPlan]) -> Term:
    """Returns the adapters of a fused leaf's parts as one term: one product for all of them."""
    pairs = []
    for adapter in parts:
        a, b = _pair(group, adapter, adapted.adapters[adapter.kind][adapter.key])
        scaling = jnp.asarray(adapted.scaling[adapter.key])
        pairs.append((a, b.times(Factor(scaling, ()))))
    spans = [a.span for a in parts if a.span is not None]
    a, b = block(pairs, spans, group.shape)
    key, rate = _dropout(adapted, group.key)
    return LowRank(a, b, jnp.ones((), b.array.dtype), key, group.key, None, rate)


def _member(
    member: Member, array: Any, terms: Mapping[AdapterPlan, Term], scale: Factor | None
) -> Weight:
    """Returns a member's weight: the group's frozen array, and what adapters there are for it."""
    served = [term for adapter, term in terms.items() if adapter.covers(member.path)]
    copies = [t for t in served if isinstance(t, Dense)]
    if all(t.sites is not None for t in copies):
        # Where a copy is for some call sites only, the frozen array is for the others.
        filters = tuple(t.sites for t in copies if t.sites is not None)
        served = [frozen(array, SiteFilter(others=filters) if filters else None), *served]
    if member.transposed:
        served = [t.rearrange(_transposed) for t in served]
        scale = None if scale is None else _transposed(scale)
    shape = array.shape[::-1] if member.transposed else array.shape
    axes = tuple((i,) for i in range(array.ndim))
    return Weight(tuple(served), scale, shape, array.dtype, (Origin(member.path, axes),))


def _transposed(factor: Factor) -> Factor:
    return factor.relabel({0: 1, 1: 0}.__getitem__)
