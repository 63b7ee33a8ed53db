"""A product with a weight and its delta, as a model's kernels are served: two thin products more.

Few operations, in forms that XLA neither copies nor makes kernels of its own for: what compiling
costs is what it makes kernels of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from flax_tied_lora._algebra.factor import RANK, Axis, Factor, contract, product_axes
from flax_tied_lora._tree.sharding import single, vary, varying

_TOKENS = "tokens"


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about the product of data with a delta.

    Attributes:
      data, near, far: labels of the operands' axes; both factors have `RANK`.
      order: labels of the axes of the result.
      accumulate, precision: as `contract` has them.
    """

    data: tuple[Axis, ...]
    near: tuple[Axis, ...]
    far: tuple[Axis, ...]
    order: tuple[Axis, ...]
    accumulate: Any
    precision: Any

    @property
    def hidden(self) -> tuple[Axis, ...]:
        return product_axes(self.data, self.near, (*self.order, *self.far))

    def fits(self) -> bool:
        """Returns whether the delta varies along each axis of the result, and of the data."""
        own = {*self.near, *self.far, *self.order}
        return {*self.hidden, *self.far} - {RANK} == {*self.order} and {*self.data} <= own

    def first(self, data: Array, near: Array) -> Array:
        """Returns the product of data with the nearer factor, not cast."""
        return contract(
            Factor(data, self.data), Factor(near, self.near), (*self.order, *self.far),
            accumulate=self.accumulate, precision=self.precision,
        ).array  # fmt: skip

    def second(self, hidden: Array, far: Array) -> Array:
        """Returns the product of what `first` returned with the other factor."""
        return second(
            Factor(hidden.astype(far.dtype), self.hidden), Factor(far, self.far), self.order,
            accumulate=self.accumulate, precision=self.precision,
        ).ordered(self.order).array  # fmt: skip

    def flat(self, data: Array) -> tuple[Form, Array]:
        """Returns the form with one axis of tokens, and the data so.

        XLA for the CPU copies what is summed over two axes, as a factor's gradient is over batch
        and length; over one it does not. Left as it is where a mesh may split the tokens.
        """
        tokens = [a for a in self.data if isinstance(a, str)]
        count, at = len(tokens), self.order.index(tokens[0]) if tokens else 0
        together = self.data[:count] == tuple(tokens) == self.order[at : at + count]
        if not together or sum(n != 1 for n in data.shape[:count]) < 2 or not single(data):
            return self, data
        merged = dataclasses.replace(
            self,
            data=(_TOKENS, *self.data[count:]),
            order=(*self.order[:at], _TOKENS, *self.order[at + count :]),
        )
        return merged, data.reshape(-1, *data.shape[count:])


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def served(
    form: Form, dot: Any, dtype: Any, pair: tuple[Array, Array], data: Array, near: Array,
    far: Array, scaling: Array,
) -> Array:  # fmt: skip
    """Returns a product with a weight plus that with its delta: one program for layers of a shape.

    Args:
      dot: parameters of the weight's own `lax.dot_general`, as sorted pairs.
      dtype: of the result.
      pair: operands of the weight's own product.
      data, near, far, scaling: of the delta's.
    """
    base = lax.dot_general(*pair, preferred_element_type=form.accumulate, **dict(dot))
    near, far = (lax.convert_element_type(f, data.dtype) for f in (near, far))
    out = added(form, base, data, near, far, lax.convert_element_type(scaling, form.accumulate))
    return lax.convert_element_type(out, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def added(form: Form, base: Array, data: Array, near: Array, far: Array, scaling: Array) -> Array:
    """Returns ``base + scaling * (data . near) . far``.

    The scaling is multiplied in where XLA fuses it into the sum; in derivatives where arrays are
    thin, so that none of the result's size is made for it.
    """
    return base + form.second(form.first(data, near), far) * scaling


def _added_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    base, data, near, far, scaling = primals
    base_dot, data_dot, near_dot, far_dot, scaling_dot = (
        None if isinstance(t, SymbolicZero) else t for t in tangents
    )
    form, data = form.flat(data)
    shape = base.shape
    hidden = form.first(data, near)
    product = form.second(hidden, far)
    hidden_dot = _sum(
        None if near_dot is None else form.first(data, near_dot),
        None if data_dot is None else form.first(data_dot.reshape(data.shape), near),
    )
    if far_dot is not None:
        # Not by the scaling in the factor's dtype: rounded, it would be off alike in each entry.
        scaled = lax.convert_element_type(far_dot, form.accumulate) * scaling
        far_dot = lax.convert_element_type(scaled, far.dtype)
    product_dot = _sum(
        None if hidden_dot is None else form.second(hidden_dot * scaling, far),
        None if far_dot is None else form.second(hidden, far_dot),
        None if scaling_dot is None else product * scaling_dot,
    )
    out = base + (product * scaling).reshape(shape)
    out_dot = _sum(base_dot, None if product_dot is None else product_dot.reshape(shape))
    out_dot = lax.full_like(out, 0) if out_dot is None else out_dot
    return out, vary(out_dot, varying(out))


added.defjvp(_added_jvp, symbolic_zeros=True)


def _sum(*arrays: Array | None) -> Array | None:
    there = [x for x in arrays if x is not None]
    return functools.reduce(lax.add, there) if there else None


def second(
    hidden: Factor, far: Factor, order: Sequence[Axis], *,
    accumulate: Any, precision: Any, out_sharding: Any = None,
) -> Factor:  # fmt: skip
    """Returns a product in an order that needs no transposition, if there is one."""
    wanted = tuple(n for n in order if n in hidden.axes or n in far.axes)
    turned = product_axes(far.axes, hidden.axes, order) == wanted
    lhs, rhs = (far, hidden) if turned else (hidden, far)
    full = out_sharding if product_axes(lhs.axes, rhs.axes, order) == tuple(order) else None
    return contract(lhs, rhs, order, accumulate=accumulate, precision=precision, out_sharding=full)
