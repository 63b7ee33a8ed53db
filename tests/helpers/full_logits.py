"""The same losses with the logits there: what `losses` is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.helpers import compiling


def cross_entropy(  # noqa: PLR0913 - as the loss that it is compared with
    hidden: Any, table: Any, labels: Any, *, weights: Any = None, bias: Any = None,
    vocab_axis: int = 0, reduction: str = "mean", ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, logit_soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Any:  # fmt: skip
    """Returns what `losses.linear_cross_entropy` does, by way of optax and all of the logits."""
    kernel = table if vocab_axis else table.T
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)
    logits *= logit_scale
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    counted = labels != ignore_index
    targets = jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1])
    out = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
    out += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    weights = jnp.where(counted, jnp.ones(labels.shape) if weights is None else weights, 0)
    out *= weights
    if reduction == "none":
        return out
    return jnp.sum(out) / (jnp.sum(weights) if reduction == "mean" else 1)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the function's result, compiled with the compiler's expensive passes off."""
    options = compiling.quick() if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)


def value_and_gradients(function: Callable[..., Any], argnums: tuple[int, ...] = (0, 1)) -> Any:
    """Returns a function's result, and the gradients of its sum, weighted by position."""

    def weighted(*args: Any) -> tuple[Any, Any]:
        out = function(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)), out

    def run(*args: Any) -> Any:
        gradients, out = jax.grad(weighted, argnums, has_aux=True)(*args)
        return out, gradients

    return run


def assert_same(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Checks two pytrees of arrays against each other, relative to an array's largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape, f"{path}: {a.shape}, expected {b.shape}"
        scale = max(np.abs(b).max(initial=0), 1e-3)
        worst = np.abs(a - b).max(initial=0) / scale
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: off by {worst:.1e}"
