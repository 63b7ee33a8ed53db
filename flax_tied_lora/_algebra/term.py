"""The terms of a symbolic weight: what a part of it can be.

`Dense` is a whole array, the frozen one or one that stands in for it; `LowRank` a delta as its two
factors; `Rows` replaced rows (`rows.py`); `Quantized` a frozen weight as it is stored
(`quantized.py`). A later kind of adapter is one more subclass of `Term`: it says how it is
rearranged and how it is materialised, and registers what it can do better than that with the rules
(`_interpreter/rules/`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
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
      whole: whether the term is an array of the weight's shape as it stands, so that to
        materialise it costs nothing and is nothing to report.
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
        """Returns the term materialised: an array of the weight's shape."""

    @abc.abstractmethod
    def times(self, scale: Factor) -> Term:
        """Returns the term with a scale over some of the weight's axes multiplied in."""

    def plus(self, other: Any) -> Term | None:
        """Returns the sum with a term of the same kind, group and sites as one term, if it is one.

        Without it a weight that is added to itself would have twice as many terms each time.
        """
        return None

    def repeated(self) -> Term:
        """Returns the term after an operation that may have put rows in several places."""
        return self

    def factor_axes(self) -> set[Axis]:
        """Returns the axes that the term's factors have: those along which a delta varies."""
        factors = (x for x in vars(self).values() if isinstance(x, Factor))
        return {a for factor in factors for a in factor.axes}

    def applies_to(self, role: str, scope: str) -> bool:
        """Returns whether the term is for a call site."""
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

    def plus(self, other):
        if {*self.factor.axes} != {*other.factor.axes}:
            return None
        return dataclasses.replace(self, factor=self.factor.plus(other.factor))

    def over(self, shape: Sequence[int]) -> Dense:
        """Returns the term with all axes of a weight of this shape, repeated along those it lacks.

        An index into an axis of one entry makes axes along which a factor does not vary.
        """
        if len(self.factor.axes) == len(shape):
            return self
        order = tuple(range(len(shape)))
        return dataclasses.replace(self, factor=Factor(self.factor.spread(order, shape), order))

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

    def plus(self, other):
        """As one, where the terms share a factor: ``a . b + c . b`` is ``(a + c) . b``."""
        if self.key is not other.key:
            return None
        for field, shared in (("a", "b"), ("b", "a")):
            mine, theirs = getattr(self, field), getattr(other, field)
            if {*mine.axes} == {*theirs.axes} and (
                getattr(self, shared).same_as(getattr(other, shared))
            ):
                if self.scaling is other.scaling:
                    return dataclasses.replace(self, **{field: mine.plus(theirs)})
                total = self._scaled(mine).plus(other._scaled(theirs))
                one = jnp.ones((), self.scaling.dtype)
                return dataclasses.replace(self, **{field: total, "scaling": one})
        return None

    def _scaled(self, factor: Factor) -> Factor:
        wide = accumulator(factor.array.dtype, self.scaling.dtype)
        return factor.astype(wide).times(Factor(self.scaling, ()))

    def product(self, order: Sequence[Axis], shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the delta materialised, its axes in the given order, its sums in float32."""
        accumulate = accumulator(dtype)
        a, b = self.a, self.b
        out = contract(a.astype(accumulate), b.astype(accumulate), order, accumulate=accumulate)
        return out.spread(order, shape) * lax.convert_element_type(self.scaling, accumulate)

    def dense(self, shape, dtype):
        return lax.convert_element_type(self.product(range(len(shape)), shape, dtype), dtype)

    def times(self, scale):
        if not scale.axes:  # the factors stay those of other terms
            wide = accumulator(self.scaling.dtype, scale.array.dtype)
            scaling = lax.convert_element_type(self.scaling, wide) * scale.array.astype(wide)
            return dataclasses.replace(self, scaling=scaling)
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
