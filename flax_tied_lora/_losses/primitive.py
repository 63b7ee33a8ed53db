"""The loss as a primitive: one operation of a traced program, whose table `adapt` can replace.

Differentiated, it forms its gradients at once, those of what is differentiated and no others: its
derivative is their product with the tangents, so a backward pass multiplies them by a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir

from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._interpreter.jaxprs import Primitive
from flax_tied_lora._losses.chunked import total, total_and_gradients
from flax_tied_lora._losses.loss import Loss
from flax_tied_lora._tree.sharding import varying

NAME = "linear_cross_entropy"

# Operands: hidden [tokens, width], labels [tokens], weights [tokens], bias [vocabulary] if there is
# one, and the table's: an array, or the parts of a symbolic weight. Result: the weighted sum.
# Parameters: ``loss``, a `Loss`; ``mapped``, for each `jax.vmap` around it, outermost first, which
# operands have a leading axis for it.
linear_cross_entropy_p = Primitive(NAME)

Mapped = tuple[tuple[bool, ...], ...]


def bind(loss: Loss, operands: Sequence[Any], mapped: Mapped = ()) -> Array:
    """Returns the loss as one operation."""
    return linear_cross_entropy_p.bind(*operands, loss=loss, mapped=mapped)


def computed(*operands: Any, loss: Loss, mapped: Mapped) -> Array:
    """Returns the loss, computed in plain JAX."""
    return _mapped(functools.partial(total, loss), mapped)(*operands)


def _mapped(function: Callable[..., Any], mapped: Mapped) -> Callable[..., Any]:
    """Returns a function under each `jax.vmap` that is around it."""
    for flags in reversed(mapped):
        function = jax.vmap(function, in_axes=[0 if axis else None for axis in flags])
    return function


@functools.cache
def _compiled(loss: Loss, mapped: Mapped) -> Callable[..., Any]:
    return jax.jit(functools.partial(computed, loss=loss, mapped=mapped))


@linear_cross_entropy_p.def_impl
def _impl(*operands: Any, loss: Loss, mapped: Mapped) -> Array:
    return _compiled(loss, mapped)(*operands)


@linear_cross_entropy_p.def_abstract_eval
def _abstract(*operands: Any, loss: Loss, mapped: Mapped) -> Any:
    # Traced, for what only JAX can say of the result: how it is placed on a mesh.
    return jax.make_jaxpr(functools.partial(computed, loss=loss, mapped=mapped))(
        *operands
    ).out_avals[0]


mlir.register_lowering(linear_cross_entropy_p, mlir.lower_fun(computed, multiple_results=False))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, loss: Loss, mapped: Mapped) -> Any:
    wrt = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def both(*values: Any) -> tuple[Array, Array]:
        operands, moved = values[: len(primals)], values[len(primals) :]
        value, gradients = total_and_gradients(loss, wrt, *operands)
        parts = [_inner(loss, g, t) for g, t in zip(gradients, moved, strict=True)]
        return value, functools.reduce(lax.add, parts)

    _refuse_untyped(loss)
    flags = tuple((*level, *(level[i] for i in wrt)) for level in mapped)
    return _mapped(both, flags)(*primals, *(tangents[i] for i in wrt))


def _inner(loss: Loss, gradient: Array, tangent: Array) -> Array:
    wide = accumulator(gradient.dtype)
    gradient, tangent = (lax.convert_element_type(x, wide) for x in (gradient, tangent))
    out = jnp.sum(gradient * tangent)
    # What each shard of the vocabulary has of the table adds up; all else is the same on each.
    return lax.psum(out, loss.axis_name) if loss.axis_name in varying(out) else out


def _refuse_untyped(loss: Loss) -> None:
    if loss.axis_name is not None and loss.axis_name not in varying(lax.axis_index(loss.axis_name)):
        raise ValueError(
            f"linear_cross_entropy: axis_name={loss.axis_name!r} inside a shard_map with "
            "check_vma=False, where it is not known which operands are sharded, so that gradients "
            "cannot be summed; use check_vma=True"
        )


ad.primitive_jvps[linear_cross_entropy_p] = _jvp


def _batched(
    operands: Sequence[Any], axes: Sequence[int | None], *, loss: Loss, mapped: Mapped
) -> Any:
    front = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)]
    flags = tuple(a is not None for a in axes)
    if flags[0]:
        loss = loss.in_one_lane()  # devices split the examples
    return bind(loss, front, (flags, *mapped)), 0


batching.primitive_batchers[linear_cross_entropy_p] = _batched
