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


def is_backward(scope: str) -> bool:
    """Returns whether an operation with this name stack belongs to a backward pass.

    Transposed twice it is what it was. What a checkpoint's backward pass computes again belongs to
    none; and where a backward pass calls another, as that of ``jax_remat3`` does, the inner counts.
    """
    times = 0
    for part in scope.split("/"):
        if RECOMPUTED in part:
            times = 0
        elif TRANSPOSED in part:
            times = part.count(TRANSPOSED)
    return times % 2 == 1


@functools.cache
def marks_are_known() -> bool:
    """Returns whether this release of JAX leaves the marks that are looked for.

    They are no part of JAX's documented interface, so they are looked for in a small gradient: the
    product of its forward pass, the same computed again, and the product of its backward pass.
    """

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("model"):
            return jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w))(w))

    shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((4, 2), jnp.float32)
    scopes = list(_products(body(jax.make_jaxpr(jax.grad(loss))(*shapes))))
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
