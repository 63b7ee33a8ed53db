"""A custom derivative as `equinox.filter_custom_vjp` makes one: of pytrees, with statics."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import jax


class filter_custom_vjp:
    """A function ``fn(vjp_arg, *args)`` whose arrays alone reach a `jax.custom_vjp`."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Takes ``forward(vjp_arg, *args)`` and ``backward(residuals, g, vjp_arg, *args)``."""

        def called(statics: Any, arrays: Any, others: Any) -> Any:
            return self.fn(*_combined(statics, arrays, others))

        def call_forward(statics: Any, arrays: Any, others: Any) -> Any:
            arguments = _combined(statics, arrays, others)
            out, residuals = forward(*arguments)
            return out, (residuals, arrays, others)

        def call_backward(statics: Any, kept: Any, g: Any) -> Any:
            residuals, arrays, others = kept
            return jax.tree.leaves(
                backward(residuals, g, *_combined(statics, arrays, others))
            ), None

        self.wrapped = jax.custom_vjp(called, nondiff_argnums=(0,))
        self.wrapped.defvjp(call_forward, call_backward)

    def __call__(self, vjp_arg: Any, *args: Any) -> Any:
        arrays, treedef = jax.tree.flatten(vjp_arg)
        is_array = tuple(isinstance(x, jax.Array) for x in args)
        others = [x for x in args if isinstance(x, jax.Array)]
        statics = treedef, is_array, tuple(x for x in args if not isinstance(x, jax.Array))
        return self.wrapped(statics, arrays, others)


def _combined(statics: Any, arrays: Any, others: Any) -> list[Any]:
    treedef, is_array, rest = statics
    of_arrays, of_rest = iter(others), iter(rest)
    args = [next(of_arrays) if known else next(of_rest) for known in is_array]
    return [jax.tree.unflatten(treedef, arrays), *args]


equinox = types.ModuleType("equinox")
equinox.filter_custom_vjp = filter_custom_vjp  # type: ignore[attr-defined]
