"""Backward passes, told by the marks that JAX leaves on name stacks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from flax_tied_lora._interpreter.jaxprs import Jaxpr, body, programs_inside
from flax_tied_lora._interpreter.sites import module_scope

TRANSPOSED = "transpose("
RECOMPUTED = "rematted_computation"
# Of a weight and of what is multiplied with it, to look for the marks.
_SHAPES = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((4, 2), jnp.float32)


def is_backward(scope: str) -> bool:
    """Returns whether an operation with this name stack belongs to a backward pass.

    Transposed twice it is what it was; and so is what a checkpoint's backward pass computes again.
    Where that pass calls another one, as with ``jax_remat3``, what it computes again belongs to
    none, and of two passes the inner one counts.
    """
    if not _checkpoints_call_another(getattr(jax.config, "jax_remat3", None)):
        return (scope.count(TRANSPOSED) - scope.count(RECOMPUTED)) % 2 == 1
    times = 0
    for part in scope.split("/"):
        if RECOMPUTED in part:
            times = 0
        elif TRANSPOSED in part:
            times = part.count(TRANSPOSED)
    return times % 2 == 1


def refuse_unknown(scope: str, leaf: str) -> None:
    """Refuses separate adapters where it cannot be told what a name stack belongs to.

    Args:
      scope: the name stack.
      leaf: the name of the leaf that has them.

    Raises:
      RuntimeError: the marks are not those of earlier releases; or they are those of a second
        derivative, and those that a checkpoint's backward pass leaves where no scope is around it.
    """
    told = (
        f"adapt: {leaf!r} has separate adapters for its call sites, and with jax {jax.__version__} "
        "it cannot be told which of them a step of a backward pass belongs to"
    )
    if not marks_are_known():
        raise RuntimeError(
            f"{told}: the marks on its name stacks are not those of earlier releases. Tie the "
            "adapters (ensure_weight_tying=None or True), or use a release of jax that "
            "flax_tied_lora was tested with"
        )
    twice = any(part.count(TRANSPOSED) > 1 for part in scope.split("/"))
    if twice and _checkpoints_call_another(getattr(jax.config, "jax_remat3", None)):
        raise RuntimeError(
            f"{told}: with jax_remat3, the mark {scope!r} is that of a checkpoint's backward pass "
            "or of a second derivative. Put a jax.named_scope around the function that is "
            "differentiated, differentiate around adapt, or turn jax_remat3 off"
        )


@functools.cache
def _checkpoints_call_another(flag: bool | None) -> bool:
    """Returns whether a checkpoint's backward pass is one within another, as with ``jax_remat3``.

    Args:
      flag: whether that is on; what is found out is kept for it.
    """

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w))(w))

    scopes = _products(body(jax.make_jaxpr(jax.grad(loss))(*_SHAPES)))
    return any(scope.count(TRANSPOSED) > 1 for scope in scopes)


@functools.cache
def marks_are_known() -> bool:
    """Returns whether this release of JAX leaves the marks that are looked for.

    They are no part of JAX's documented interface, so they are looked for in a small gradient: the
    product of its forward pass, the same computed again, and the product of its backward pass.
    """

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("model"):
            return jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w))(w))

    scopes = list(_products(body(jax.make_jaxpr(jax.grad(loss))(*_SHAPES))))
    modules = {part for scope in scopes for part in module_scope(scope).split("/")}
    return [*map(is_backward, scopes)] == [False, False, True] and modules == {"model"}


def _products(jaxpr: Jaxpr, outside: str = "") -> Iterator[str]:
    """Yields the name stack of each product in a program and the programs inside it."""
    for eqn in jaxpr.eqns:
        scope = "/".join(s for s in (outside, str(eqn.source_info.name_stack)) if s)
        if eqn.primitive.name == "dot_general":
            yield scope
        for inner in programs_inside(eqn):
            yield from _products(inner, scope)
