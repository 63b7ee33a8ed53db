"""Parts of fused leaves, each with factors of its own: q, k and v in one kernel, gate and up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra.factor import RANK, Factor
from flax_tied_lora._config.axes_and_parts import parts_of_leaf
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.matches import excluded
from flax_tied_lora._planning.tying import Part
from flax_tied_lora._ties.sources import TieGroup
from flax_tied_lora._tree.sharding import replicated

Span = tuple[int, int, int]


def fused_parts(group: TieGroup, leaf: Any, whole: Part, config: LoraConfig) -> tuple[Part, ...]:
    """Returns the parts of a fused leaf that are targeted, or the leaf as it is if it has none.

    Raises:
      ValueError: the config cuts members of the group differently; the leaf is cut by call sites,
        too; a part is targeted that there is not.
    """
    spans = _spans(group, leaf, config)
    if not spans:
        return (whole,)
    if whole.members or whole.sites is not None:
        raise ValueError(
            f"wrap: {group.key!r} is in parts {', '.join(map(repr, spans))}, and "
            f"ensure_weight_tying=False wants an adapter for {whole.name!r} only; leave one of the "
            "two out"
        )
    found = []
    for name, span in spans.items():
        hits = tuple(
            h for h in whole.hits
            if h.part == name
            or (not h.part and not excluded(config, f"{h.leaf}:{name}", f"{h.module}:{name}"))
        )  # fmt: skip
        if hits:
            found.append(dataclasses.replace(whole, hits=hits, name=name, span=span))
    return tuple(found)


def _spans(group: TieGroup, leaf: Any, config: LoraConfig) -> dict[str, Span]:
    """Returns the parts of a group's canonical leaf, by name."""
    found: dict[str, dict[str, Span]] = {}
    for member in group.members:
        shape = tuple(leaf.shape)[::-1] if member.transposed else tuple(leaf.shape)
        own = parts_of_leaf(config.parts, member.path, shape)
        if own and member.transposed:
            own = {name: (1 - axis, *cut) for name, (axis, *cut) in own.items()}
        if own:
            found[member.path] = own  # type: ignore[assignment]
    first, *others = found or [""]
    for other in others:
        if found[other] != found[first]:
            raise ValueError(
                f"wrap: parts cuts {first!r} into {found[first]} and {other!r} into "
                f"{found[other]}, in the layout of {group.key!r}, which both are; say one thing"
            )
    return found.get(first, {})


def cut(array: jax.Array, span: Span | None) -> jax.Array:
    """Returns the part of an array of a leaf's shape that a span is."""
    if span is None:
        return array
    axis, start, stop = span
    return lax.slice_in_dim(array, start, stop, axis=axis)


def pasted(array: jax.Array, part: jax.Array, span: Span | None) -> jax.Array:
    """Returns an array with the part that a span is replaced."""
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
    sides = []
    for side in zip(*pairs, strict=True):
        whole = [Factor(replicated(f.array), f.axes) for f in side]
        padded = [_padded(f, s, shape) for f, s in zip(whole, spans, strict=True)]
        axes = padded[0].axes
        sides.append(Factor(lax.concatenate([f.array for f in padded], axes.index(RANK)), axes))
    return sides[0], sides[1]


def _padded(factor: Factor, span: Span, shape: Sequence[int]) -> Factor:
    axis, start, stop = span
    if axis not in factor.axes:
        return factor
    widths = [(start, shape[axis] - stop, 0) if a == axis else (0, 0, 0) for a in factor.axes]
    zero = jnp.zeros((), factor.array.dtype)
    return Factor(lax.pad(factor.array, zero, widths), factor.axes)
