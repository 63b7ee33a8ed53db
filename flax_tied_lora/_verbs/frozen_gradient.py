"""Frozen params that are differentiated: noticed while they are, at no cost to the program."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._tree.paths import is_tracer


class FrozenGradientWarning(UserWarning):
    """Frozen params are differentiated, at the cost of a gradient of their size."""

    __module__ = "flax_tied_lora"


def watched(adapted: Adapted, leaves: Mapping[str, Any]) -> Adapted:
    """Returns an `Adapted` that warns where its adapted leaves are differentiated.

    One of its scalings has passed through a function of it and the leaves whose derivative is that
    of the identity; the leaves themselves are used as they are. Were they what passes through, a
    function that is compiled first and differentiated then would write a copy of each.

    Args:
      leaves: the params, by path.
    """
    frozen = {g.key: leaves[g.key] for g in adapted.plan.adapted if _may_be(leaves[g.key])}
    if not frozen or not adapted.scaling:
        return adapted
    names, arrays = tuple(frozen), tuple(frozen.values())
    key = next(iter(adapted.scaling))
    passed = _as_it_is(names, adapted.scaling[key], arrays)
    return dataclasses.replace(adapted, scaling={**adapted.scaling, key: passed})


def _may_be(leaf: Any) -> bool:
    return is_tracer(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_it_is(names: tuple[str, ...], scaling: Any, frozen: tuple[Any, ...]) -> Any:
    return scaling


def _rule(names: tuple[str, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    pairs = zip(names, tangents[1], strict=True)
    found = [name for name, tangent in pairs if not isinstance(tangent, SymbolicZero)]
    if found:
        more = f" and {len(found) - 1} more are" if len(found) > 1 else " is"
        warnings.warn(
            f"adapt: the frozen {found[0]!r}{more} differentiated: each step makes a gradient "
            "of the base's size, which training has no use for. tied_lora.value_and_grad(loss_fn)"
            "(adapted, ...) differentiates the adapters alone; of an nnx.Module "
            "nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))",
            FrozenGradientWarning,
            stacklevel=2,
        )
    return primals[0], tangents[0]


_as_it_is.defjvp(_rule, symbolic_zeros=True)
