"""What is said where a weight is materialised."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import jax

from flax_tied_lora._algebra.term import LowRank, Term
from flax_tied_lora._algebra.weight import MOST, Weight
from flax_tied_lora._interpreter.sites import DENSE, DEQUANTISED, Read
from flax_tied_lora._tree.table import cell


class DensifyWarning(UserWarning):
    """A weight and its delta were materialised as one array, at the cost of that array."""

    __module__ = "flax_tied_lora"


class DensifyError(ValueError):
    """The same, refused: ``on_dense="error"``."""

    __module__ = "flax_tied_lora"


def densified(read: Read) -> str:
    """Returns the message for a call site that had its weight materialised."""
    site = read.site
    where = f" in {site.scope!r}" if site.scope else ""
    what = "is handed back" if site.operation == "return" else f"is read by {site.operation!r}"
    if read.served == DEQUANTISED:
        return (
            f"adapt: {site.leaf!r}, which is stored quantised, {what}{where}, {QUANTIZED}; it was "
            f"dequantised into one array of {cell(read.bytes)} bytes. Leave it out of what is "
            "quantised (exclude_modules), write a rule (register_rule), or accept the cost with "
            'on_dense="allow"'
        )
    dropout = ", and dropout, which is on, does nothing here" if read.undropped else ""
    return (
        f"adapt: {site.leaf!r} {what}{where}, {reason_for(site.operation)}; the weight and its "
        f"delta were materialised as one array of {cell(read.bytes)} bytes{dropout}. Take it out "
        'of target_modules, write a rule (register_rule), or accept the cost with on_dense="allow"'
    )


def warn_of_dense(reads: Sequence[Read], stacklevel: int = 3) -> None:
    """Warns once for each call site that had its weight materialised."""
    for read in dict.fromkeys(r for r in reads if r.served in (DENSE, DEQUANTISED)):
        warnings.warn(densified(read), DensifyWarning, stacklevel=stacklevel)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why some operations have a weight materialised.

    Attributes:
      why: what warnings and the page say.
      operations: names of the JAX primitives.
    """

    why: str
    operations: tuple[str, ...]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Of a frozen weight that is stored quantised, whatever the operation.
QUANTIZED = "which is no lookup and no plain product, or takes its blocks of integers apart"


REASONS = (
    Reason(
        "which is not linear in the weight: f(W + D) is not f(W) + f(D)",
        _names(
            "abs acos acosh asin asinh atan atan2 atanh cbrt clamp cos cosh digamma erf erf_inv "
            "erfc exp exp2 expm1 integer_pow lgamma log log1p logistic max min pow rem rsqrt sign "
            "sin sinh sqrt square tan tanh reduce_max reduce_min reduce_prod cummax cummin cumprod "
            "cumlogsumexp"
        ),
    ),
    Reason(
        "which rounds, or reads bits: a sum rounded is not the sum of what was rounded",
        _names("bitcast_convert_type ceil convert_element_type floor reduce_precision round"),
    ),
    Reason(
        "which asks for the entries of the sum itself",
        _names("argmax argmin eq ge gt is_finite le lt ne sort top_k"),
    ),
    Reason(
        "which multiplies entry by entry with what varies along all of the weight's axes: a low "
        "rank does not survive that",
        _names("div mul"),
    ),
    Reason(
        f"which adds data of the weight's own size to it, or makes more than {MOST} deltas of one "
        "adapter: a matrix is made in any case",
        _names("add add_any sub"),
    ),
    Reason(
        f"which puts more than {MOST} deltas of one adapter together",
        _names("concatenate stack"),
    ),
    Reason(
        "which puts rows and columns into one axis",
        _names("reshape"),
    ),
    Reason(
        "which goes over rows and columns together, or over an axis that both factors have",
        _names("reduce_sum cumsum"),
    ),
    Reason(
        "which takes some entries of the weight and others of another array",
        _names("dynamic_update_slice scatter scatter-add select_n"),
    ),
    Reason(
        "which fills in a value, where an index is out, along an axis that the delta lacks",
        _names("gather"),
    ),
    Reason(
        "where the weight is the data, or groups have no axis of their own in the factors",
        _names("conv_general_dilated ragged_dot ragged_dot_general"),
    ),
    Reason(
        "whose scale varies along rows and columns both",
        _names("dot_general linear_cross_entropy"),
    ),
    Reason(
        "which decomposes it: that of a sum is not the sum of two",
        _names("cholesky eig eigh lu qr svd triangular_solve"),
    ),
    Reason(
        "which has a derivative of its own that taking it apart would lose; a rule for the "
        "function keeps it",
        _names("custom_jvp_call custom_vjp_call"),
    ),
    Reason(
        "which changes it from step to step",
        _names("scan while"),
    ),
    Reason(
        "which is a program that JAX does not see into",
        _names("debug_callback debug_print ffi_call io_callback pallas_call pure_callback"),
    ),
    Reason(
        "as one array: that is what leaves a function, or branches that make different ones",
        _names("return"),
    ),
)


# What is said of all others.
OTHERWISE = "for which there is no low-rank rule"


_BY_OPERATION = {name: reason.why for reason in REASONS for name in reason.operations}


def reason_for(operation: str) -> str:
    """Returns why an operation has a weight materialised."""
    return _BY_OPERATION.get(operation, OTHERWISE)


def is_plain(weight: Weight, terms: Sequence[Term]) -> bool:
    """Returns whether a weight is one array as it stands, so that nothing is materialised."""
    return len(terms) == 1 and terms[0].whole and weight.scale is None


def served_by(terms: Sequence[Term]) -> str:
    """Returns how a call site is served by terms that need not be materialised."""
    adapters = [t for t in terms if t.group]
    if any(isinstance(t, LowRank) for t in adapters):
        return "low rank"
    if any(not t.whole for t in adapters):
        return "rows"
    if adapters:
        return "copy"
    return "quantised" if any(t.stored for t in terms) else "plain"


def bytes_of(weight: Weight) -> int:
    """Returns how many bytes a weight has as one array."""
    return math.prod(weight.shape) * jax.numpy.dtype(weight.dtype).itemsize
