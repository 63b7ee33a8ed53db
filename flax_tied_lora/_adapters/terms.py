"""The symbolic weights of an `Adapted`: each adapter of its plan as a term."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._algebra.factor import RANK, Factor, accumulator, contract
from flax_tied_lora._algebra.quantized import Quantized, frozen
from flax_tied_lora._algebra.quantized_product import product, squares
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.weight import Dense, LowRank, Origin, Term, Weight
from flax_tied_lora._planning.fused import block
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan
from flax_tied_lora._ties.find import Member
from flax_tied_lora._tree.boxes import is_box, unboxed
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.paths import is_tracer
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._tree.sharding import automatic, explicit


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
                magnitude = jnp.asarray(unboxed(own["lora_magnitude"]))
                scale = _dora_scale(array, terms[adapter], magnitude, group)
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
        return Dense(copy, adapter.key, adapter.sites)
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
        own = [_turned_term(t) for t in own]
        scale = None if scale is None else _turned_factor(scale)
    shape = array.shape[::-1] if member.transposed else array.shape
    axes = tuple((i,) for i in range(array.ndim))
    return Weight(tuple(own), scale, shape, array.dtype, (Origin(member.path, axes),))


def _turned_term(term: Term) -> Term:
    moved = term.rearrange(_turned, _turned_factor)
    if isinstance(term, Dense) and isinstance(moved, Dense):
        return dataclasses.replace(moved, turned=term.array)
    return moved


def _turned(array: jax.Array) -> jax.Array:
    return lax.transpose(array, (1, 0))


def _turned_factor(factor: Factor) -> Factor:
    return factor.relabel({0: 1, 1: 0}.__getitem__)


def _dora_scale(array: Any, delta: Term, magnitude: jax.Array, group: GroupPlan) -> Factor:
    """Returns DoRA's scale: the magnitude over the norm of each column of weight and delta.

    The norm is a constant to differentiation (DoRA, arXiv:2402.09353, section 4.3; PEFT's
    ``DoraLinearLayer``). The delta is not added up: ``|w + d|^2 = |w|^2 + 2 w.d + |d|^2``, the last
    two by way of the rank axis.
    """
    assert isinstance(delta, LowRank)
    accumulate = accumulator(array.dtype)
    keep = (*group.batch, *group.cols)
    options: dict[str, Any] = {"accumulate": accumulate}
    a, b, scaling = jax.tree.map(
        lax.stop_gradient,
        (delta.a.astype(accumulate), delta.b.astype(accumulate),
         lax.convert_element_type(delta.scaling, accumulate)),
    )  # fmt: skip
    squares, cross = _norms_and_product(array, a, keep, accumulate)

    def over_rank(first: Factor) -> jax.Array:
        product = contract(first, b, keep, **options).ordered(keep)
        return product.array

    cross = over_rank(cross)
    other = Factor(a.array, tuple("rank of b" if n == RANK else n for n in a.axes))
    gram = contract(a, other, (*group.batch, RANK, "rank of b"), **options)
    second = Factor(b.array, tuple("rank of b" if n == RANK else n for n in b.axes))
    inner = contract(gram, second, (*keep, RANK), **options)
    norm = jnp.sqrt(jnp.maximum(squares + 2 * scaling * cross + scaling**2 * over_rank(inner), 0))
    # A column of zeros has no direction; PEFT makes it NaN.
    norm = jnp.where(norm > 0, norm, 1)
    return Factor(magnitude.astype(accumulate) / norm, keep)


def _norms_and_product(
    array: Any, a: Factor, keep: tuple[int, ...], accumulate: Any
) -> tuple[jax.Array, Factor]:
    """Returns the sum of a weight's squares over its rows, and its product with a factor."""
    order = (*keep, RANK)
    if is_quantized(array):
        term = Quantized.of(array)
        options: dict[str, Any] = {"dtype": array.dtype, "accumulate": accumulate}
        own = explicit(jax.typeof(array.values))
        summed = functools.partial(squares, keep=keep, accumulate=accumulate)
        if own is not None:
            names = [own.spec[i] for i in keep]
            options["out_sharding"] = jax.NamedSharding(own.mesh, jax.P(*names, None))
            summed = automatic(summed, jax.NamedSharding(own.mesh, jax.P(*names)))
        both = summed(term), product(term, a.array, a.axes, order, **options)
        return jax.tree.map(lax.stop_gradient, (both[0], Factor(both[1], order)))
    w = Factor(lax.stop_gradient(array), tuple(range(array.ndim))).astype(accumulate)
    left = tuple(i for i in w.axes if i in keep)
    rows = [i for i in w.axes if i not in keep]
    summed = Factor(jnp.sum(jnp.square(w.array), axis=rows), left).ordered(keep).array
    return summed, contract(w, a, order, accumulate=accumulate)


def shapes_of(adapted: Adapted) -> Sequence[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Returns for every array of every adapter its key, its name, its shape and the plan's."""
    found = []
    for group, adapter in adapted.plan.adapters():
        own = adapted.adapters[adapter.kind][adapter.key]
        for name, shape in group.shapes(adapter).items():
            array = unboxed(own[name] if name else own)
            found.append((adapter.key, name or adapter.kind, tuple(array.shape), shape))
    return found
