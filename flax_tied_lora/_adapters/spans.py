"""Arrays of the parts of a fused leaf: cut out, put back, and their factors as one pair."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from flax_tied_lora._algebra.factor import RANK, Factor
from flax_tied_lora._planning.plan import Span
from flax_tied_lora._tree.sharding import replicated


def cut(array: jax.Array, span: Span | None) -> jax.Array:
    """Returns the part of a leaf's array that a span is; all of it without one."""
    if span is None:
        return array
    axis, start, stop = span
    return lax.slice_in_dim(array, start, stop, axis=axis)


def pasted(array: jax.Array, part: jax.Array, span: Span | None) -> jax.Array:
    """Returns a leaf's array with the part that a span is replaced."""
    if span is None:
        return part
    axis, start, stop = span
    return array.at[(*[slice(None)] * axis, slice(start, stop))].set(part)


def block(
    pairs: Sequence[tuple[Factor, Factor]], spans: Sequence[Span], shape: Sequence[int]
) -> tuple[Factor, Factor]:
    """Returns one pair of factors for several parts of a leaf: side by side along the rank.

    What a pair has along the axis that its part is cut from is padded with zeros, so that the
    product is each part's own delta in its place.
    """
    margins = [{axis: (start, shape[axis] - stop, 0)} for axis, start, stop in spans]

    def side_by_side(factors: Sequence[Factor]) -> Factor:
        whole = [Factor(replicated(f.array), f.axes) for f in factors]
        padded = [f.padded(m) for f, m in zip(whole, margins, strict=True)]
        axes = padded[0].axes
        return Factor(lax.concatenate([f.array for f in padded], axes.index(RANK)), axes)

    lora_a, lora_b = zip(*pairs, strict=True)
    return side_by_side(lora_a), side_by_side(lora_b)
