"""The symbolic weights of an `Adapted`: each adapter of its plan as a term."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._adapters import dora
from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._algebra.factor import Factor
from flax_tied_lora._algebra.quantized import frozen
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.term import Dense, LowRank, Term
from flax_tied_lora._algebra.weight import Origin, Weight
from flax_tied_lora._planning.fused import block
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan
from flax_tied_lora._ties.find import Member
from flax_tied_lora._tree.boxes import is_box, unboxed
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.quantized_array import is_quantized


def weights_of(adapted: Adapted, leaves: Mapping[str, Any], dtype: Any = None) -> dict[str, Weight]:
    """Returns the symbolic weight of every member of every adapted group, by leaf path.

    Args:
      leaves: the params, by path.
      dtype: of copies; by default the leaf's.

    Raises:
      ValueError: the adapters are stacked, and not one of them is selected.
    """
    weights = {}
    adapted, there = _selected(adapted)
    for group in adapted.plan.adapted:
        leaf = leaves[group.key]
        array = leaf if is_quantized(leaf) else jnp.asarray(leaf)
        terms, scale = {}, None
        if parts := [a for a in group.adapters if a.span is not None]:
            terms[parts[0]] = _parts_term(adapted, group, parts, there)
        for adapter in group.adapters:
            if adapter.span is not None:
                continue
            own = adapted.adapters[adapter.kind][adapter.key]
            terms[adapter] = _term(adapted, group, adapter, own, array, dtype, there)
            if adapter.dora:
                scale = dora.scale(array, terms[adapter], own, group)
                scale = Factor(_where(there, scale.array, 1), scale.axes)
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


def _selected(adapted: Adapted) -> tuple[Adapted, jax.Array | None]:
    """Returns the adapters of a slot, and whether there are any: None where there are no slots.

    Under `jax.vmap` over slots nothing is stacked again: each array is gathered where it is used.
    """
    slot = adapted.slot
    for key, name, found, expected in shapes_of(adapted):
        if len(found) != len(expected) + (slot is not None):
            slots = [] if slot is None else ["slots"]
            raise ValueError(
                f"adapt: {name} of {key!r} is {list(found)}, expected {[*slots, *expected]}: of "
                "stacked adapters one serves a call, tied_lora.select(stacked, 0); or one each "
                "example, by tied_lora.per_example, or jax.vmap with tied_lora.adapter_axes"
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

    def of_slot(array: Any) -> Any:
        return lax.dynamic_index_in_dim(jnp.asarray(unboxed(array)), slot, keepdims=False)

    both = adapted.adapters, adapted.scaling
    adapters, scaling = jax.tree.map(of_slot, both, is_leaf=is_box)
    one = dataclasses.replace(adapted, adapters=adapters, scaling=scaling, slot=None)
    # A slot that is not there serves nobody's adapter, rather than its neighbour's.
    return one, (slot >= 0) & (slot < count)


def _where(there: jax.Array | None, array: jax.Array, other: Any) -> jax.Array:
    """Returns the array where an adapter is there, and what stands in for it where none is."""
    return array if there is None else jnp.where(there, array, other)


def _term(
    adapted: Adapted, group: GroupPlan, adapter: AdapterPlan, own: Any, table: Any,
    dtype: Any, there: jax.Array | None,
) -> Term:  # fmt: skip
    """Returns an adapter as a term, in the layout of the group's canonical leaf."""
    if adapter.kind == TRAINABLE_TOKENS:
        rows = jnp.asarray(unboxed(own))
        term = Rows.replacing(
            adapter.tokens, rows, table, group.token_axis, adapter.key, adapter.sites
        )
        values = Factor(_where(there, term.values.array, 0), term.values.axes)
        return dataclasses.replace(term, values=values)
    if adapter.kind != LORA:
        kind = dtype or table.dtype
        copy = lax.convert_element_type(jnp.asarray(unboxed(own)), kind)
        if there is not None:
            copy = _where(there, copy, frozen(table).dense(tuple(table.shape), kind))
        return Dense.of(copy, adapter.key, adapter.sites)
    a, b = _pair(group, adapter, own)
    scaling = _where(there, jnp.asarray(adapted.scaling[adapter.key]), 0)
    key, rate = _dropout(adapted, adapter.key)
    return LowRank(a, b, scaling, key, adapter.key, adapter.sites, rate)


def _pair(group: GroupPlan, adapter: AdapterPlan, own: Any) -> tuple[Factor, Factor]:
    axes = group.axes(adapter)
    a, b = (Factor(jnp.asarray(unboxed(own[name])), axes[name]) for name in ("lora_a", "lora_b"))
    return a, b


def _dropout(adapted: Adapted, key: str) -> tuple[jax.Array | None, float]:
    """Returns an adapter's random key and rate, if dropout is on."""
    rate = float(adapted.plan.config.lora_dropout)
    if not rate or adapted.rng is None:
        return None, 0.0
    return jax.random.fold_in(adapted.rng, key_number(key)), rate


def _parts_term(
    adapted: Adapted, group: GroupPlan, parts: Sequence[AdapterPlan], there: jax.Array | None
) -> Term:
    """Returns the adapters of a fused leaf's parts as one term: one product for all of them."""
    pairs = []
    for adapter in parts:
        a, b = _pair(group, adapter, adapted.adapters[adapter.kind][adapter.key])
        scaling = _where(there, jnp.asarray(adapted.scaling[adapter.key]), 0)
        pairs.append((a, b.times(Factor(scaling, ()))))
    spans = [a.span for a in parts if a.span is not None]
    a, b = block(pairs, spans, group.shape)
    key, rate = _dropout(adapted, group.key)
    return LowRank(a, b, jnp.ones((), b.array.dtype), key, group.key, None, rate)


def _member(
    member: Member, array: Any, terms: Mapping[AdapterPlan, Term], scale: Factor | None
) -> Weight:
    own = [term for adapter, term in terms.items() if adapter.covers(member.path)]
    copies = [t for t in own if isinstance(t, Dense)]
    if all(t.sites is not None for t in copies):
        # Where a copy is for some call sites only, the frozen array is for the others.
        filters = tuple(t.sites for t in copies if t.sites is not None)
        own = [frozen(array, SiteFilter(others=filters) if filters else None), *own]
    if member.transposed:
        own = [t.rearrange(_transposed) for t in own]
        scale = None if scale is None else _transposed(scale)
    shape = array.shape[::-1] if member.transposed else array.shape
    axes = tuple((i,) for i in range(array.ndim))
    return Weight(tuple(own), scale, shape, array.dtype, (Origin(member.path, axes),))


def _transposed(factor: Factor) -> Factor:
    return factor.relabel({0: 1, 1: 0}.__getitem__)


def shapes_of(adapted: Adapted) -> Sequence[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Returns for every array of every adapter its key, its name, its shape and the plan's."""
    found = []
    for group, adapter in adapted.plan.adapters():
        own = adapted.adapters[adapter.kind][adapter.key]
        for name, shape in group.shapes(adapter).items():
            array = unboxed(own[name] if name else own)
            found.append((adapter.key, name or adapter.kind, tuple(array.shape), shape))
    return found
