"""Checks of what a loss is called with: each says what was found, and what to do."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp

WHO = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def check_arrays(hidden: Any, table: Any, labels: Any, vocab_axis: Any) -> None:
    """Checks hidden states [..., width], table and labels [...] against each other.

    Raises:
      TypeError: of their dtypes.
      ValueError: of their shapes.
    """
    if vocab_axis not in (0, 1) or isinstance(vocab_axis, bool):
        raise ValueError(
            f"{WHO}: vocab_axis={vocab_axis!r}; expected 0, for a table [vocabulary, width], or 1, "
            "for a kernel [width, vocabulary]"
        )
    for name, array in (("hidden", hidden), ("table", table)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{WHO}: {name} is {array.dtype}; expected floating point")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{WHO}: labels are {labels.dtype}; expected integers, one for each token")
    if len(table.shape) != 2:
        raise ValueError(
            f"{WHO}: the table has shape {table.shape}; expected two axes, [vocabulary, width] "
            "(or [width, vocabulary] with vocab_axis=1)"
        )
    width = table.shape[1 - vocab_axis]
    if hidden.ndim == 0 or hidden.shape[-1] != width:
        other = hidden.ndim > 0 and hidden.shape[-1] == table.shape[vocab_axis]
        hint = f"; with vocab_axis={1 - vocab_axis} it fits" if other else ""
        raise ValueError(
            f"{WHO}: hidden has shape {hidden.shape} and the table {table.shape}, which with "
            f"vocab_axis={vocab_axis} has width {width}; expected hidden [..., {width}]{hint}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{WHO}: labels have shape {labels.shape}; expected {hidden.shape[:-1]}, one for each "
            f"of the hidden states {hidden.shape}"
        )


def check_beside(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Checks weights or bias.

    Raises:
      TypeError: of dtype.
      ValueError: of shape.
    """
    kind = array.dtype
    if not any(jnp.issubdtype(kind, k) for k in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{WHO}: {name} are {kind}; expected numbers")
    if array.shape != shape:
        raise ValueError(f"{WHO}: {name} has shape {array.shape}; expected {shape}")


def check_options(
    *, reduction: Any, ignore_index: Any, label_smoothing: Any, z_loss: Any, logit_soft_cap: Any,
    logit_scale: Any, axis_name: Any, chunk_size: Any,
) -> None:  # fmt: skip
    """Checks everything that is no array.

    Raises:
      ValueError: an option is out of range, or no Python number.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{WHO}: reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    _check("ignore_index", ignore_index, _is_integer(ignore_index), "an int32")
    _check_float("label_smoothing", label_smoothing, 0, 1, "from 0 up to, not including, 1")
    _check_float("z_loss", z_loss, 0, math.inf, "from 0")
    _check_float("logit_scale", logit_scale, -math.inf, math.inf, "finite")
    if logit_soft_cap is not None:
        least = math.ulp(0)
        _check_float("logit_soft_cap", logit_soft_cap, least, math.inf, "above 0, or None")
    if axis_name is not None:
        _check("axis_name", axis_name, isinstance(axis_name, str), "the name of a mesh axis")
    if chunk_size is not None:
        enough = _is_integer(chunk_size) and chunk_size > 0
        _check("chunk_size", chunk_size, enough, "a number of tokens, 1 or more, or None")


def _check_float(name: str, value: Any, least: float, below: float, expected: str) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and least <= float(value) < below
    _check(name, value, fits, f"a Python number, {expected}")


def _is_integer(value: Any) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and abs(int(value)) < 2**31


def _check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{WHO}: {name}={value!r}; expected {expected}")
