"""`linear_cross_entropy`: a loss that never holds the logits."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._algebra.quantized import frozen
from flax_tied_lora._algebra.weight import Origin, Weight
from flax_tied_lora._losses.checks import WHO, check_arrays, check_beside, check_options
from flax_tied_lora._losses.chunked import per_token
from flax_tied_lora._losses.loss import Loss
from flax_tied_lora._losses.primitive import bind
from flax_tied_lora._losses.splitting import FEW_CHUNKS, chunk_of, lanes_of
from flax_tied_lora._tree.open_sizes import supposed
from flax_tied_lora._tree.quantized_array import QuantizedArray

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(  # noqa: PLR0913 - options of a loss, all by keyword
    hidden: ArrayLike, table: ArrayLike | QuantizedArray, labels: ArrayLike, *,
    weights: ArrayLike | None = None, bias: ArrayLike | None = None,
    vocab_axis: int = 0, reduction: Reduction = "mean",
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    logit_soft_cap: float | None = None, logit_scale: float = 1.0, axis_name: str | None = None,
    chunk_size: int | None = None, precision: lax.PrecisionLike = None,
) -> Array:  # fmt: skip
    """Returns the softmax cross-entropy of ``hidden @ table.T``, a chunk of logits at a time.

    The logits are ``soft_cap(logit_scale * (hidden @ table.T + bias))``. Products accumulate in
    float32, and all that follows them is float32. Differentiated in reverse mode, the gradients of
    hidden states, table, bias and weights, of those that are asked for, are formed together with
    the loss, chunk by chunk, so that no logits are computed twice or kept; evaluated, none are
    formed. Inside `adapt` the table stays symbolic: low rank, replaced rows, a copy, a scale or
    quantised.

    Args:
      hidden: final hidden states, [..., width], floating point.
      table: [vocabulary, width], as embeddings are, or with ``vocab_axis=1`` [width, vocabulary],
        as kernels are; an array or a `QuantizedArray`.
      labels: [...], integers. Where one is ``ignore_index`` the token does not count; where it is
        no row of the table either, the loss is NaN.
      weights: [...], a weight for each token, 0 for padding; None for 1.
      bias: [vocabulary] or None.
      vocab_axis: axis of the table that the vocabulary lies along.
      reduction: ``"mean"``, the weighted sum over the weights' sum; where that is 0, as it is of
        padding alone, 0 with gradients of 0 and never NaN; ``"sum"``; or
        ``"none"``, [...], which computes a chunk's logits again when it is differentiated.
      ignore_index: the label of tokens that do not count.
      label_smoothing: share of the label's probability that goes to all of the vocabulary alike
        (`optax.smooth_labels`).
      z_loss: times the square of the log of the softmax's normaliser, added (arXiv:2204.02311).
      logit_soft_cap: the cap in ``cap * tanh(logits / cap)`` (Gemma 2); None for none.
      logit_scale: factor of the logits, before the cap.
      axis_name: inside a `jax.shard_map`, the mesh axis that the vocabulary is split over: table
        and bias are a device's part, labels are numbers of the whole vocabulary.
      chunk_size: tokens that have logits at the same time, on all devices together; by default a
        sixteenth of all, from 128 to 1,024 for each device of a mesh; 128 where `jax.export`
        leaves open how many there are.
      precision: of the products, as `jax.lax.dot_general` has it.

    Returns:
      float32 (float64 for such hidden states), a scalar, or of the labels' shape.

    Raises:
      TypeError: of dtypes: hidden states or table are not floating point, labels no integers.
      ValueError: shapes do not fit, or an option is out of range.

    Example::

      def loss_fn(params, tokens):
          hidden = model.apply({"params": params}, tokens[:, :-1], method=model.hidden_states)
          table = params["embed"]["embedding"]
          return tied_lora.losses.linear_cross_entropy(hidden, table, tokens[:, 1:])

      loss, grads = tied_lora.value_and_grad(tied_lora.adapt(loss_fn))(adapted, tokens)
    """
    _refuse_adapted(hidden=hidden, table=table, labels=labels)
    check_options(
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, logit_soft_cap=logit_soft_cap, logit_scale=logit_scale,
        axis_name=axis_name, chunk_size=chunk_size,
    )  # fmt: skip
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    table = table if isinstance(table, QuantizedArray) else jnp.asarray(table)
    check_arrays(hidden, table, labels, vocab_axis)
    wide, shape = accumulator(hidden.dtype), labels.shape
    weights = jnp.ones(shape, wide) if weights is None else jnp.asarray(weights)
    check_beside("weights", weights, shape)
    operands = [
        hidden.reshape(-1, hidden.shape[-1]),
        lax.convert_element_type(labels, jnp.int32).reshape(-1),
        lax.convert_element_type(weights, wide).reshape(-1),
    ]
    if bias is not None:
        bias = jnp.asarray(bias)
        check_beside("bias", bias, (table.shape[vocab_axis],))
        operands.append(bias)
    leaves, structure = jax.tree.flatten(
        _weight(table) if isinstance(table, QuantizedArray) else table
    )
    tokens, lanes = math.prod(shape), lanes_of(hidden)
    chunk = -(-chunk_size // lanes) if chunk_size else chunk_of(tokens, lanes)
    loss = Loss(
        vocab_axis=vocab_axis,
        lanes=lanes,
        chunk=chunk,
        sparing=chunk * lanes >= supposed(tokens) / FEW_CHUNKS,
        table=structure,
        bias=bias is not None,
        ignore_index=int(ignore_index),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
        logit_scale=float(logit_scale),
        axis_name=axis_name,
        precision=precision,
    )
    operands += leaves
    if reduction == "none":
        return (operands[2] * per_token(loss, *operands)).reshape(shape)
    total = bind(loss, operands)
    if reduction == "sum":
        return total
    whole = jnp.sum(jnp.where(operands[1] == loss.ignore_index, 0, operands[2]))
    # A mean of nothing is 0, with gradients of 0: weights that cancel out have none either.
    return jnp.where(whole == 0, 0, total / jnp.where(whole == 0, 1, whole))


def _weight(table: Any) -> Weight:
    """Returns a quantised table as a symbolic weight, which is multiplied a chunk at a time."""
    axes = tuple((i,) for i in range(2))
    return Weight((frozen(table),), None, table.shape, table.dtype, (Origin("table", axes),))


def _refuse_adapted(**arguments: Any) -> None:
    """Refuses an `Adapted`, whose leaves are weights only inside of `adapt`.

    Raises:
      TypeError: an argument is one.
    """
    for name, value in arguments.items():
        if isinstance(value, Adapted):
            raise TypeError(
                f"{WHO}: {name} is an Adapted; write the loss as a function of plain params, give "
                "their table to it, and call tied_lora.adapt(that function)(adapted, ...)"
            )
