"""Operations that multiply data with a weight: the delta is served by two thin products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jax import Array, lax

from flax_tied_lora._algebra import delta_product, kernel_product, quantized_product
from flax_tied_lora._algebra import rows as replaced_rows
from flax_tied_lora._algebra.factor import (
    Axis,
    Factor,
    NotServedError,
    accumulator,
    operation_dtype,
)
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._algebra.term import LowRank, Term
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.serving import (
    Part,
    Products,
    dropped,
    refuse_differentiated,
    serve,
    without_dropout,
)
from flax_tied_lora._tree.open_sizes import supposed
from flax_tied_lora._tree.sharding import explicit


@rule("dot_general")
def dot_general(context, eqn, lhs, rhs):
    operand = 0 if isinstance(lhs, Weight) else 1
    weight, x = (rhs, lhs) if operand else (lhs, rhs)
    contracting, batch = (pair[operand] for pair in eqn.params["dimension_numbers"])
    free = [i for i in range(len(weight.shape)) if i not in (*contracting, *batch)]
    product = _described(eqn, operand)

    scale = weight.scale
    scaled = set() if scale is None else {*scale.axes}
    if not (scaled <= {*contracting, *batch} or scaled <= {*free, *batch}):
        raise NotServedError
    other = 1 - operand
    paired = eqn.params["dimension_numbers"][0][other]
    lookup = context.picks_rows(weight, contracting, eqn.invars[other], paired)
    terms = context.read(
        eqn.primitive.name, weight, LOOKUP if lookup else PROJECTION,
        rows=contracting, cols=free, batch=batch,
    )  # fmt: skip
    if scale is not None and scaled & {*contracting}:
        x = _scaled(x, product.data, scale, operation_dtype(x.dtype, weight.dtype))
        scale = None
    if lookup and context.is_table(weight):
        for term in terms:
            # The transpose of a projection reads as a lookup: rows are summed over.
            refuse_differentiated(context, term)
        terms = tuple(without_dropout(t) for t in terms)
    rows = supposed(*(weight.shape[i] for i in contracting))
    last = len(terms) == 1 and scale is None
    products = _Products(context, eqn, weight, x, operand, product, rows, len(terms) == 1, last)
    if scale is None:
        served = products.together(terms)
        return [serve(context, eqn, weight, x, terms, products) if served is None else served]
    after = scale.spread(product.order, eqn.outvars[0].aval.shape)
    return [serve(context, eqn, weight, x, terms, products, after)]


@dataclasses.dataclass
class _Products(Products):
    """The products of an equation ``dot_general``.

    Attributes:
      context, eqn, weight: as a rule has them.
      x: the other operand: data, or another weight; scaled, where the scale is over what is summed.
      operand: which operand the weight is.
      product: the description of the product.
      height: how many rows of the weight are summed over.
      alone: whether there is one term.
      last: whether its product is the result.
    """

    context: Any
    eqn: Any
    weight: Weight
    x: Any
    operand: int
    product: Product
    height: int
    alone: bool
    last: bool

    def dense(self, factor: Factor) -> Array:
        if isinstance(self.x, Weight):
            array = factor.ordered(range(len(self.weight.shape))).array
            return self.context.apply(self.eqn, self._pair(array))[0]
        array, dimensions = self._as_stored(factor)
        kind = self.product.accumulate
        if self.last:
            kind = self.eqn.params["preferred_element_type"]
        lhs, rhs = self._pair(array)
        return lax.dot_general(
            lhs, rhs, dimensions, self.product.precision, kind,
            out_sharding=self.eqn.params["out_sharding"],
        )  # fmt: skip

    def low_rank(self, term: LowRank, data: Any, sharding: Any) -> Part:
        shape = self.eqn.outvars[0].aval.shape
        if isinstance(data, Weight):
            return delta_product.of_weight(self.product, data, term, shape)
        return delta_product.of_data(
            self.product, data, term, shape,
            rows=self.height, alone=self.alone, out_sharding=sharding,
        )  # fmt: skip

    def rows(self, term: Rows, data: Array) -> Part:
        return replaced_rows.product(term, data, self.product, self.eqn.outvars[0].aval.shape)

    def quantized(self, term: Quantized, data: Array) -> Part:
        return quantized_product.product(
            term, data, self.product, self.weight.dtype, explicit(self.eqn.outvars[0].aval)
        )

    def together(self, terms: Sequence[Term]) -> Array | None:
        """Returns the product with an array and a delta in one function, if it is one of these."""
        if isinstance(self.x, Weight):
            return None
        x, weight = self.x, self.weight.dtype
        found = delta_product.beside_one_array(self.product, x, terms, self.height)
        if found is None:
            return None
        dense, term, first, second = found
        data = None
        if term.key is not None:
            refuse_differentiated(self.context, term)
            data = dropped(term, lax.convert_element_type(x, operation_dtype(x.dtype, weight)))
        array, dimensions = self._as_stored(dense.factor)
        form = kernel_product.Form(
            self.product, self.operand, dimensions, self.eqn.params["out_sharding"], weight,
            self.eqn.outvars[0].aval.dtype,
        )  # fmt: skip
        return kernel_product.served(form, x, array, data, first, second, term.scaling)

    def _pair(self, array: Array) -> list[Any]:
        """Returns the operands with an array in the place of the weight."""
        return [self.x, array] if self.operand else [array, self.x]

    def _as_stored(self, factor: Factor) -> tuple[Array, Any]:
        """Returns a weight's array as it is stored, and the dimensions of the product with it.

        Where free axes would change places in the result, they are put in order.
        """
        numbers = self.eqn.params["dimension_numbers"]
        if factor.in_order():
            return factor.array, numbers
        used = {i for pair in numbers for i in pair[self.operand]}
        free = [a for a in factor.axes if a not in used]
        if free != sorted(free):
            return factor.ordered(range(len(factor.axes))).array, numbers
        stored = [list(pair) for pair in numbers]
        for pair in stored:
            pair[self.operand] = tuple(factor.axes.index(i) for i in pair[self.operand])
        return factor.array, tuple(map(tuple, stored))


def _described(eqn: Any, operand: int) -> Product:
    """Returns the description of an equation, the weight being one of its operands."""
    params, other = eqn.params, eqn.invars[1 - operand].aval
    return _product(
        params["dimension_numbers"], operand, eqn.invars[operand].aval.ndim, other.ndim,
        eqn.outvars[0].aval.dtype, params["precision"],
    )  # fmt: skip


# Equations of one form are described once.
@functools.lru_cache(maxsize=1024)
def _product(
    dimensions: Any, operand: int, ndim: int, other_ndim: int, dtype: Any, precision: Any
) -> Product:
    contracting, batch = dimensions
    other = 1 - operand
    free = [i for i in range(ndim) if i not in (*contracting[operand], *batch[operand])]
    paired = dict(
        zip((*contracting[other], *batch[other]), (*contracting[operand], *batch[operand]),
            strict=True)
    )  # fmt: skip
    data = tuple(paired.get(i, f"x{i}") for i in range(other_ndim))
    rest = [a for a in data if isinstance(a, str)]
    kept = [*rest, *free] if operand else [*free, *rest]
    # A named algorithm says itself what it adds up in.
    named = not isinstance(precision, (type(None), tuple, lax.Precision))
    accumulate = dtype if named else accumulator(dtype)
    return Product(data, (*batch[operand], *kept), accumulate, precision)


def _scaled(x: Any, labels: tuple[Axis, ...], scale: Factor, dtype: Any) -> Any:
    """Returns data with the scale of the axes that it is paired with."""
    if isinstance(x, Weight):
        return x.with_scale(scale.relabel(labels.index))
    return Factor(x, labels).astype(dtype).times(scale).array
