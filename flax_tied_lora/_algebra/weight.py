"""The symbolic weight: a matrix kept as its parts while the model is traced, never added up.

A `Weight` is an optional scale times a sum of terms. A `Term` is one part: `Dense`, a whole array,
the frozen one or one that stands in for it; `LowRank`, a delta as its two factors; replaced rows
(`rows.py`). A later kind of adapter is one more subclass of `Term`: it says how it is rearranged
and how it is added up, and registers what it can do better than being added up with the rules
(`_interpreter/rules/`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import (
    Axis,
    Factor,
    NotServedError,
    accumulator,
    contract,
    pytree,
)
from flax_tied_lora._algebra.site_filter import SiteFilter


class Term(abc.ABC):
    """One part of a symbolic weight.

    Attributes:
      whole: whether the term is an array of the weight's shape as it stands, so that adding it up
        costs nothing and is nothing to report.
      stored: whether the term is a frozen weight in another form than that of an array.
      group: key of the adapter that the term belongs to; "" for what is frozen.
      sites: the call sites that the term is for; None for all.
    """

    whole: ClassVar[bool] = False
    stored: ClassVar[bool] = False
    group: str = ""
    sites: SiteFilter | None = None

    @abc.abstractmethod
    def rearrange(self, move: Callable[[Factor], Factor]) -> Term:
        """Returns the term after a rearranging operation.

        Args:
          move: the operation, on an array that has some of the weight's axes.

        Raises:
          NotServedError: the parts cannot follow the operation.
        """

    @abc.abstractmethod
    def dense(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the term added up: an array of the weight's shape."""

    @abc.abstractmethod
    def times(self, scale: Factor) -> Term:
        """Returns the term with a scale over some of the weight's axes multiplied in."""

    def repeated(self) -> Term:
        """Returns the term after an operation that may have put rows in several places."""
        return self

    def factor_axes(self) -> set[Axis]:
        """Returns the axes that the term's factors have: those along which a delta varies."""
        factors = (x for x in vars(self).values() if isinstance(x, Factor))
        return {a for factor in factors for a in factor.axes}

    def applies_to(self, role: str, scope: str) -> bool:
        """Returns whether the term is there for a call site."""
        return self.sites is None or self.sites(role, scope)

    def renamed(self, names: Callable[[str], str]) -> Term:
        """Returns the term under another name of its adapter, if it is one's."""
        this: Any = self
        return dataclasses.replace(this, group=names(self.group)) if self.group else self

    def fold(self, data: Any) -> Term:
        """Returns the term with its random key, if it has one, folded for a place or a step.

        A vector of steps makes a key for each.
        """
        return self


@pytree("group", "sites")
class Dense(Term):
    """A whole array. Operations on it are those of the unadapted model, but for transpositions.

    Attributes:
      factor: the array, over all of the weight's axes, in the order in which it is stored.
      group: key of the adapter that it is a trainable copy of; "" for the frozen one.
      sites: the call sites that it is for; None for all. Those of the frozen array and of its
        copies never overlap.
    """

    whole: ClassVar[bool] = True

    factor: Factor
    group: str = ""
    sites: SiteFilter | None = None

    @classmethod
    def of(cls, array: Array, group: str = "", sites: SiteFilter | None = None) -> Dense:
        """Returns the term that an array of the weight's shape is."""
        return cls(Factor(array, tuple(range(array.ndim))), group, sites)

    @property
    def array(self) -> Array:
        """The array, its axes in the order of the weight's."""
        return self.factor.ordered(range(len(self.factor.axes))).array

    def rearrange(self, move):
        return dataclasses.replace(self, factor=move(self.factor))

    def dense(self, shape, dtype):
        return lax.convert_element_type(self.array, dtype)

    def times(self, scale):
        return dataclasses.replace(self, factor=self.factor.times(scale))


@pytree("group", "sites", "dropout")
class LowRank(Term):
    """A delta ``scaling * (a . b)``, the product being over the rank axis.

    A weight axis that only ``a`` has is a row axis, one that only ``b`` has a column axis, one that
    both have a batch axis (stacked layers, experts).

    Attributes:
      a, b: the factors.
      scaling: scalar.
      key: for dropout on what is multiplied with the weight; None for none.
      group: key of the adapter that the factors are.
      sites: the call sites that the term is for; None for all.
      dropout: rate, in [0, 1).
    """

    a: Factor
    b: Factor
    scaling: Array
    key: Array | None
    group: str
    sites: SiteFilter | None = None
    dropout: float = 0.0

    def rearrange(self, move):
        return dataclasses.replace(self, a=move(self.a), b=move(self.b))

    def product(self, order: Sequence[Axis], shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the delta added up, its axes in the given order, products added up in float32."""
        accumulate = accumulator(dtype)
        a, b = self.a, self.b
        out = contract(a.astype(accumulate), b.astype(accumulate), order, accumulate=accumulate)
        return out.spread(order, shape) * lax.convert_element_type(self.scaling, accumulate)

    def dense(self, shape, dtype):
        return lax.convert_element_type(self.product(range(len(shape)), shape, dtype), dtype)

    def times(self, scale):
        for field in ("a", "b"):
            factor: Factor = getattr(self, field)
            if set(scale.axes) <= set(factor.axes):
                return dataclasses.replace(self, **{field: factor.times(scale)})
        raise NotServedError

    def fold(self, data):
        if self.key is None:
            return self
        fold_in = (
            jax.random.fold_in if jnp.ndim(data) == 0 else jax.vmap(jax.random.fold_in, (None, 0))
        )
        return dataclasses.replace(self, key=fold_in(self.key, data))


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
        """Returns the weight that is a dense array plus deltas of its shape."""
        terms = (Dense.of(dense), *deltas)
        return cls(terms, None, tuple(dense.shape), dense.dtype, tuple(dict.fromkeys(origins)))

    def replace(self, **changes: Any) -> Weight:
        return dataclasses.replace(self, **changes)

    @property
    def keyed(self) -> bool:
        """Whether a term has a random key: dropout is on."""
        return any(isinstance(t, LowRank) and t.key is not None for t in self.terms)

    def parted(self) -> tuple[Array, tuple[Term, ...]]:
        """Returns the dense terms added up, and the other terms. The scale must be folded.

        What is for some call sites only stays among the others.

        Raises:
          NotServedError: the frozen weight is no array, so that there is nothing to put deltas on.
        """
        if any(t.stored for t in self.terms):
            raise NotServedError
        dense = [t.array for t in self.terms if isinstance(t, Dense) and t.sites is None]
        others = tuple(t for t in self.terms if not isinstance(t, Dense) or t.sites is not None)
        return add(dense) if dense else jnp.zeros(self.shape, self.dtype), others

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
        return Weight(
            terms=tuple(term.rearrange(move) for term in self.terms),
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
        """Returns the terms that are there for a call site."""
        return tuple(t for t in self.terms if t.applies_to(role, scope))

    def fold(self, data: Any) -> Weight:
        """Returns the weight with its terms' random keys folded for a place or a step."""
        terms = tuple(t.fold(data) for t in self.terms)
        return self.replace(terms=terms) if any(map(_differ, terms, self.terms)) else self

    def dense(self, terms: Sequence[Term] | None = None) -> Array:
        """Returns the terms (default: all) added up, in float32 or wider, cast once at the end."""
        terms = self.terms if terms is None else terms
        if self.scale is None and len(terms) == 1 and isinstance(terms[0], Dense):
            return terms[0].dense(self.shape, self.dtype)
        accumulate = accumulator(self.dtype)
        total = add([t.dense(self.shape, accumulate) for t in terms])
        if self.scale is not None:
            total *= self.scale.astype(accumulate).spread(range(len(self.shape)), self.shape)
        return lax.convert_element_type(total, self.dtype)


def _differ(a: Any, b: Any) -> bool:
    return a is not b


def add(arrays: Sequence[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = lax.add(total, array)  # no broadcasting: all terms are of one shape
    return total
