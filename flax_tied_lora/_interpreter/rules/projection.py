"""Operations that multiply data with a weight: the delta is served by two thin products."""

from __future__ import annotations

import dataclasses
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
    product = _described(eqn, operand, free)

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
        array, options = self._as_stored(factor)
        kind = self.product.accumulate
        if self.last:
            kind = self.eqn.params["preferred_element_type"]
        return lax.dot_general(*self._pair(array), **options, preferred_element_type=kind)

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
        pair = delta_product.beside_one_array(self.product, self.x, terms, self.height)
        if pair is None:
            return None
        dense, term = pair
        refuse_differentiated(self.context, term)
        data = lax.convert_element_type(self.x, operation_dtype(self.x.dtype, self.weight.dtype))
        first, second = delta_product.factors_of(
            self.product, Factor(self.x, self.product.data), term
        )
        data = dropped(term, data) if term.key is not None else data
        array, options = self._as_stored(dense.factor.astype(self.weight.dtype))
        return kernel_product.served(
            self.product, tuple(options.items()), self.eqn.outvars[0].aval.dtype,
            self._pair(array), data, first, second, term.scaling,
        )  # fmt: skip

    def _pair(self, array: Array) -> list[Any]:
        """Returns the operands with an array in the place of the weight."""
        return [self.x, array] if self.operand else [array, self.x]

    def _as_stored(self, factor: Factor) -> tuple[Array, dict[str, Any]]:
        """Returns a weight's array as it is stored, and the parameters of the product with it.

        Where free axes would change places in the result, they are put in order.
        """
        numbers = self.eqn.params["dimension_numbers"]
        used = {i for pair in numbers for i in pair[self.operand]}
        free = [a for a in factor.axes if a not in used]
        if free != sorted(free):
            factor = factor.ordered(range(len(factor.axes)))
        stored = [list(pair) for pair in numbers]
        for pair in stored:
            pair[self.operand] = tuple(factor.axes.index(i) for i in pair[self.operand])
        options = {name: self.eqn.params[name] for name in ("out_sharding", "precision")}
        return factor.array, {"dimension_numbers": tuple(map(tuple, stored)), **options}


def _described(eqn: Any, operand: int, free: Sequence[int]) -> Product:
    """Returns the description of an equation, the weight being one of its operands."""
    contracting, batch = eqn.params["dimension_numbers"]
    other = 1 - operand
    paired = dict(
        zip((*contracting[other], *batch[other]), (*contracting[operand], *batch[operand]),
            strict=True)
    )  # fmt: skip
    data = tuple(paired.get(i, f"x{i}") for i in range(eqn.invars[other].aval.ndim))
    rest = [a for a in data if isinstance(a, str)]
    kept = [*rest, *free] if operand else [*free, *rest]
    dtype, precision = eqn.outvars[0].aval.dtype, eqn.params["precision"]
    # A named algorithm says itself what it adds up in.
    named = not isinstance(precision, (type(None), tuple, lax.Precision))
    accumulate = dtype if named else accumulator(dtype)
    return Product(data, (*batch[operand], *kept), accumulate, precision)


def _scaled(x: Any, labels: tuple[Axis, ...], scale: Factor, dtype: Any) -> Any:
    """Returns data with the scale of the axes that it is paired with."""
    if isinstance(x, Weight):
        return x.with_scale(scale.relabel(labels.index))
    return Factor(x, labels).astype(dtype).times(scale).array
