"""The symbolic weight: a matrix kept as its parts while the model is traced, never materialised.

A `Weight` is an optional scale times a sum of terms (`term.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import (
    Factor,
    NotServedError,
    accumulator,
    contract,
    pytree,
    sum_of,
)
from flax_tied_lora._algebra.term import Dense, LowRank, Term

# How many deltas of one adapter a weight may have. Each addition of a weight to itself can double
# them, where they share no factor; that many are no longer cheaper than an array.
MOST = 32


@dataclasses.dataclass(frozen=True)
class Origin:
    """A leaf that a weight came from, and for each axis of the weight the leaf axes it holds.

    Attributes:
      picked: leaf axes that were indexed on the way, where that may still turn out to be a lookup.
      picked_by: the operation that did.
    """

    leaf: str
    axes: tuple[tuple[int, ...], ...]
    picked: tuple[int, ...] = ()
    picked_by: str = ""

    def on_leaf(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Returns the leaf axes that some axes of the weight hold."""
        return tuple(sorted({x for i in axes for x in self.axes[i]}))


@pytree("shape", "dtype", "origins")
class Weight:
    """A symbolic weight: ``scale * (term + term + ...)``.

    Attributes:
      terms: its parts.
      scale: a factor over some of its axes, or None.
      shape, dtype: of the array that it stands for.
      origins: the leaves that it came from.
    """

    terms: tuple[Term, ...]
    scale: Factor | None
    shape: tuple[int, ...]
    dtype: Any
    origins: tuple[Origin, ...]

    @classmethod
    def of(cls, dense: Array, deltas: Sequence[Term], origins: Sequence[Origin]) -> Weight:
        """Returns the weight that is a dense array plus deltas of its shape.

        Raises:
          NotServedError: one adapter has more deltas of its own than `MOST`.
        """
        terms = (Dense.of(dense), *_combined(deltas))
        return cls(terms, None, tuple(dense.shape), dense.dtype, tuple(dict.fromkeys(origins)))

    def replace(self, **changes: Any) -> Weight:
        return dataclasses.replace(self, **changes)

    @property
    def keyed(self) -> bool:
        """Whether a term has a random key: dropout is on."""
        return any(isinstance(t, LowRank) and t.key is not None for t in self.terms)

    def parted(self) -> tuple[Array, tuple[Term, ...]]:
        """Returns the sum of the dense terms, and the other terms. The scale must be folded.

        What is for some call sites only stays among the others.

        Raises:
          NotServedError: the frozen weight is no array that deltas could stand beside.
        """
        if any(t.stored for t in self.terms):
            raise NotServedError
        dense = [t.array for t in self.terms if isinstance(t, Dense) and t.sites is None]
        others = tuple(t for t in self.terms if not isinstance(t, Dense) or t.sites is not None)
        return sum_of(dense) if dense else jnp.zeros(self.shape, self.dtype), others

    def rearrange(
        self, aval: Any, move: Callable[[Factor], Factor], axes: Sequence[Sequence[int]]
    ) -> Weight:
        """Returns the weight after an operation that only rearranges it.

        Args:
          aval: shape and dtype of the result.
          move: as in `Term.rearrange`.
          axes: for each axis of the result, the axes of this weight that it holds.

        Raises:
          NotServedError: a term cannot follow.
        """
        terms = [term.rearrange(move) for term in self.terms]
        return Weight(
            terms=tuple(t.over(aval.shape) if isinstance(t, Dense) else t for t in terms),
            scale=None if self.scale is None else move(self.scale),
            shape=tuple(aval.shape),
            dtype=aval.dtype,
            origins=tuple(
                dataclasses.replace(o, axes=tuple(o.on_leaf(held) for held in axes))
                for o in self.origins
            ),
        )

    def folded(self) -> Weight:
        """Returns the same weight with its scale multiplied into the terms."""
        if self.scale is None:
            return self
        return self.replace(terms=tuple(t.times(self.scale) for t in self.terms), scale=None)

    def with_scale(self, scale: Factor) -> Weight:
        """Returns the weight times a scale over some of its axes."""
        if self.scale is None:
            return self.replace(scale=scale)
        accumulate = accumulator(scale.array.dtype, self.scale.array.dtype)
        product = contract(
            self.scale.astype(accumulate), scale.astype(accumulate), range(len(self.shape)),
            accumulate=accumulate,
        )  # fmt: skip
        return self.replace(scale=product)

    def at(self, role: str, scope: str) -> tuple[Term, ...]:
        """Returns the terms that are for a call site."""
        return tuple(t for t in self.terms if t.applies_to(role, scope))

    def fold(self, data: Any) -> Weight:
        """Returns the weight with its terms' random keys folded for a place or a step."""
        terms = tuple(t.fold(data) for t in self.terms)
        return self.replace(terms=terms) if any(map(_differ, terms, self.terms)) else self

    def dense(self, terms: Sequence[Term] | None = None) -> Array:
        """Returns the sum of terms (default: all), in float32 or wider, cast once at the end."""
        terms = self.terms if terms is None else terms
        if self.scale is None and len(terms) == 1 and isinstance(terms[0], Dense):
            return terms[0].dense(self.shape, self.dtype)
        accumulate = accumulator(self.dtype)
        total = sum_of([t.dense(self.shape, accumulate) for t in terms])
        if self.scale is not None:
            total *= self.scale.astype(accumulate).spread(range(len(self.shape)), self.shape)
        return lax.convert_element_type(total, self.dtype)


def _combined(terms: Sequence[Term]) -> list[Term]:
    """Returns terms of the same sum, those that can be one being one."""
    alike: dict[Any, list[Term]] = {}
    for term in terms:
        found = alike.setdefault((type(term), term.group, term.sites), [])
        for i, earlier in enumerate(found):
            both = earlier.plus(term)
            if both is not None:
                found[i] = both
                break
        else:
            found.append(term)
    if any(len(found) > MOST for found in alike.values()):
        raise NotServedError
    return [term for found in alike.values() for term in found]


def _differ(a: Any, b: Any) -> bool:
    return a is not b
