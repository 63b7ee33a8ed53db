"""Operations that pick rows of a weight by index: lookups, and indexing into stacked weights.

Both factors are indexed as the weight is, each along the axes that it has. Where only one of them
is indexed, rows are picked and the product is small: it is materialised on the spot. Where both are
(layers, experts), what was picked is a weight again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Factor, NotServedError, accumulator, sum_of
from flax_tied_lora._algebra.for_cpu import joins_tokens, tokens_joined
from flax_tied_lora._algebra.site_filter import LOOKUP
from flax_tied_lora._algebra.term import Dense, LowRank
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._tree.open_sizes import is_open
from flax_tied_lora._tree.sharding import placed_as


@rule("gather")
def gather(context, eqn, weight, indices):
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        raise NotServedError
    dims = eqn.params["dimension_numbers"]
    batch = _batch_positions(eqn)
    indexed = [a for a in dims.start_index_map if not _is_whole(eqn, a)]
    scaled_later = weight.scale is not None and context.stays_weight("gather", weight, indexed)
    if scaled_later and not _survives(eqn.params["fill_value"]):
        weight = weight.folded()  # what is filled in is not scaled
    picked = (*indexed, *dims.operand_batching_dims)
    held: list[Sequence[int]] = [()] * eqn.outvars[0].aval.ndim
    for position in batch:
        held[position] = picked
    for axis, position in _offset_positions(eqn).items():
        held[position] = (axis,)
    if not _is_clamped(eqn):
        for term in weight.terms:
            if not (term.whole or term.stored) and set(indexed) - term.factor_axes():
                # The delta is constant there, and where the index is out it or its gradient is 0.
                raise NotServedError

    def move(factor: Factor) -> Factor:
        if not factor.is_array(len(weight.shape)):
            # Where an index is out of bounds the fill value stands, so the delta is 0.
            return _gather_factor(factor, eqn, indices, fill=0)
        if not factor.in_order():
            return _gather_factor(factor, eqn, indices, eqn.params["fill_value"])
        (array,) = context.run(eqn, [factor.array, indices])
        return Factor(array, tuple(range(array.ndim)))

    # Beside axes of which one entry is picked, a window over others is a choice of columns.
    rows = [a for a in indexed if a in dims.collapsed_slice_dims] or indexed
    return _pick(context, eqn, weight, indices, indexed, rows, move, held)


def _survives(fill: Any) -> bool:
    """Returns whether a fill value is the same times any scale."""
    return fill is None or fill == 0 or bool(fill != fill)


def _is_clamped(eqn: Any) -> bool:
    """Returns whether an index that is out of bounds stands for the nearest one, gradients too."""
    return eqn.params["mode"] == lax.GatherScatterMode.CLIP


def _is_whole(eqn: Any, axis: int) -> bool:
    """Returns whether a gather takes all of an axis wherever its index points."""
    return _is_clamped(eqn) and eqn.params["slice_sizes"][axis] == eqn.invars[0].aval.shape[axis]


@rule("dynamic_slice")
def dynamic_slice(context, eqn, weight, *starts):
    if not isinstance(weight, Weight):
        raise NotServedError
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(weight.shape) if sizes[i] != n]

    def move(factor: Factor) -> Factor:
        begin = [starts[0] * 0 if a == RANK else starts[a] for a in factor.axes]
        shape = [factor.size(RANK) if a == RANK else sizes[a] for a in factor.axes]
        array = lax.dynamic_slice(factor.array, begin, shape, allow_negative_indices=False)
        return Factor(array, factor.axes)

    held = [(i,) for i in range(len(weight.shape))]
    return _pick(context, eqn, weight, None, cut, cut, move, held)


def _pick(
    context: Any, eqn: Any, weight: Weight, indices: Any, indexed: Sequence[int],
    rows: Sequence[int], move: Any, held: Any,
):  # fmt: skip
    aval = eqn.outvars[0].aval
    if not indexed:
        return [weight.rearrange(aval, move, held)]
    if context.stays_weight(eqn.primitive.name, weight, indexed):
        origins = tuple(
            dataclasses.replace(o, picked=o.on_leaf(rows), picked_by=eqn.primitive.name)
            for o in weight.origins
        )
        terms = weight.terms
        if eqn.params.get("mode") == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            terms = tuple(map(_scaled_before, terms))
        picked = weight.replace(origins=origins, terms=terms).rearrange(aval, move, held)
        return [picked.replace(terms=tuple(t.repeated() for t in picked.terms))]
    dims = eqn.params.get("dimension_numbers")
    batch = () if dims is None else dims.operand_batching_dims
    terms = context.read(eqn.primitive.name, weight, LOOKUP, rows=rows, batch=batch)
    accumulate, fill = accumulator(aval.dtype), eqn.params.get("fill_value")
    parts, low_rank = [], False
    for term in terms:
        moved = term.rearrange(move)
        if isinstance(moved, Dense):
            parts.append(moved.array)
        elif isinstance(moved, LowRank):
            low_rank = True
            cast = LowRank(
                moved.a.astype(aval.dtype),
                moved.b.astype(aval.dtype),
                moved.scaling,
                None,
                moved.group,
            )
            parts.append(_product(cast, aval))
        else:
            rows_picked = moved.dense(aval.shape, accumulate)
            if term.stored:
                rows_picked = _filled(rows_picked, eqn, indices, eqn.params.get("fill_value"))
            parts.append(rows_picked)
    scale = None if weight.scale is None else move(weight.scale)
    if len(parts) == 1 and scale is None and not low_rank:
        return [lax.convert_element_type(parts[0], aval.dtype)]
    out = sum_of([lax.convert_element_type(p, accumulate) for p in parts])
    if scale is not None:
        # What is filled in is not scaled: times NaN, the scale's gradient would be NaN.
        out = _filled(out, eqn, indices, 0)
        out *= scale.astype(accumulate).spread(range(aval.ndim), aval.shape)
        out = _filled(out, eqn, indices, fill)
    return [_as_differentiated(lax.convert_element_type(out, aval.dtype), eqn, indices)]


def _product(term: LowRank, aval: Any) -> Array:
    """Returns the delta of what was picked, [..., columns]; over one axis of tokens if it can."""
    count = aval.ndim - 1
    picked, other = (term.a, term.b) if 0 in term.a.axes else (term.b, term.a)
    alone = picked.axes == (*range(count), RANK) and {*other.axes} == {count, RANK}
    if not alone or not joins_tokens(picked.array, count):
        return term.product(range(aval.ndim), aval.shape, aval.dtype)
    rows = Factor(tokens_joined(picked.array, count), (0, RANK))
    flat = LowRank(rows, other.relabel(lambda _: 1), term.scaling, None, term.group)
    shape = (rows.size(0), other.size(count))
    return flat.product(range(2), shape, aval.dtype).reshape(aval.shape)


def _filled(array: Array, eqn: Any, indices: Any, fill: Any) -> Array:
    """Returns what was picked with a fill value where an index is out of bounds; None is NaN."""
    if eqn.params.get("mode") != lax.GatherScatterMode.FILL_OR_DROP:
        return array
    other = jnp.full_like(array, jnp.nan if fill is None else fill)
    return lax.select(_inside(eqn, indices, array), array, other)


def _as_differentiated(array: Array, eqn: Any, indices: Any) -> Array:
    """Returns what was picked, with no derivative where an index is out of bounds.

    That is how JAX has all modes but the clamped one: that of ``table[ids]`` promises that no index
    is out, picks the last row and drops its gradient; where a value is filled in, which may be NaN,
    a gradient that is NaN would reach the factor that is not indexed.
    """
    if "mode" not in eqn.params or _is_clamped(eqn):
        return array

    @jax.custom_jvp
    def same(array: Array, indices: Array) -> Array:
        return array

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        array, indices = primals
        tangent = tangents[0]
        inside = _inside(eqn, indices, tangent)
        return same(array, indices), lax.select(inside, tangent, jnp.zeros_like(tangent))

    return same(array, indices)


def _scaled_before(term: Any) -> Any:
    """Returns a term whose scaling is in a factor: it is indexed, and so is its derivative."""
    if not isinstance(term, LowRank):
        return term
    one = jnp.ones((), term.scaling.dtype)
    return dataclasses.replace(term, a=term.a.times(Factor(term.scaling, ())), scaling=one)


def _inside(eqn: Any, indices: Array, like: Array) -> Array:
    """Returns where an array that was picked is from indices within bounds (`lax.gather`)."""
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    last = [shape[a] - sizes[a] for a in eqn.params["dimension_numbers"].start_index_map]
    # As unsigned numbers, those below 0 are above all others.
    kind = jnp.dtype(f"uint{8 * indices.dtype.itemsize}")
    most = jnp.iinfo(kind).max
    bounds = [jnp.asarray(n if is_open(n) else min(n, most), kind) for n in last]
    found = lax.convert_element_type(indices, kind)
    if len(last) == 1:
        found = lax.squeeze(found, [found.ndim - 1])
        inside = lax.le(found, lax.full_like(found, bounds[0]))
    else:
        all_bounds = lax.broadcast_in_dim(jnp.stack(bounds), found.shape, (found.ndim - 1,))
        inside = jnp.all(lax.le(found, all_bounds), axis=-1)
    return placed_as(lax.broadcast_in_dim(inside, like.shape, _batch_positions(eqn)), like)


def _batch_positions(eqn: Any) -> list[int]:
    offsets = eqn.params["dimension_numbers"].offset_dims
    return [i for i in range(eqn.outvars[0].aval.ndim) if i not in offsets]


def _offset_positions(eqn: Any) -> dict[int, int]:
    """Returns, for each operand axis that the result keeps, its position in the result."""
    dims = eqn.params["dimension_numbers"]
    gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = [i for i in range(eqn.invars[0].aval.ndim) if i not in gone]
    return dict(zip(kept, dims.offset_dims, strict=True))


def _gather_factor(factor: Factor, eqn: Any, indices: Array, fill: Any) -> Factor:
    """Returns a factor indexed as the weight is, along the axes that the factor has."""
    p = eqn.params
    dims, sizes = p["dimension_numbers"], p["slice_sizes"]
    offsets = _offset_positions(eqn)
    here = factor.axes
    columns = [
        k
        for k, axis in enumerate(dims.start_index_map)
        if axis in here and not _is_whole(eqn, axis)
    ]
    pairs = [
        (axis, k)
        for axis, k in zip(
            dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True
        )
        if axis in here
    ]
    pairs.sort(key=lambda pair: here.index(pair[0]))
    window = [factor.size(RANK) if a == RANK else sizes[a] for a in here]
    positions = {**offsets, RANK: RANK}
    batch = _batch_positions(eqn)
    if not columns:
        # Nothing to pick from: axes walked in step with the indices are axes of the result.
        positions |= {axis: batch[k] for axis, k in pairs}
        walked = dict(pairs)
        window = [factor.size(a) if a in walked else n for a, n in zip(here, window, strict=True)]
        cut = lax.slice(factor.array, [0] * len(window), window)
        gone = [i for i, a in enumerate(here) if a not in positions]
        return Factor(lax.squeeze(cut, gone), tuple(positions[a] for a in here if a in positions))
    kept = [positions[a] for a in here if a in positions]
    if len(columns) < len(dims.start_index_map):
        indices = jnp.stack([indices[..., k] for k in columns], axis=-1)
    whole = len(columns) == len(dims.start_index_map) and len(pairs) == len(
        dims.operand_batching_dims
    )
    start = indices.ndim - 1
    array = lax.gather(
        factor.array,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(start, start + len(kept))),
            collapsed_slice_dims=tuple(
                sorted(here.index(a) for a in dims.collapsed_slice_dims if a in here)
            ),
            start_index_map=tuple(here.index(dims.start_index_map[k]) for k in columns),
            operand_batching_dims=tuple(here.index(a) for a, _ in pairs),
            start_indices_batching_dims=tuple(k for _, k in pairs),
        ),
        tuple(window),
        unique_indices=p["unique_indices"] and whole,
        indices_are_sorted=p["indices_are_sorted"] and whole,
        mode=p["mode"],
        fill_value=fill,
    )
    return Factor(array, (*batch, *kept))
