"""A call of a person's function of which only some arguments are traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flax_tied_lora._tree.paths import is_tracer


@dataclasses.dataclass
class Outputs:
    """What a call returned: the traced values are taken out, everything else is kept as it is."""

    leaves: list[Any]
    treedef: Any
    traced: list[int]

    def filled(self, values: Sequence[Any]) -> Any:
        return filling(self.treedef, self.leaves, self.traced)(values)


@dataclasses.dataclass
class Calls:
    """A function, and how its arguments are made of the values that are traced.

    All else is closed over: NumPy masks that the model branches on, rng keys, flags, strings,
    model objects reach the function as they are.

    Attributes:
      fn: the function.
      arguments: returns ``(args, kwargs)`` from the traced values.
    """

    fn: Callable[..., Any]
    arguments: Callable[[Sequence[Any]], tuple[Any, Any]]

    def jaxpr(self, avals: Sequence[Any]) -> tuple[Any, Outputs]:
        """Returns the program of the call, and what it returns around its outputs."""
        outputs: list[Outputs] = []

        def run(*values: Any) -> list[Any]:
            args, kwargs = self.arguments(values)
            results, treedef = jax.tree.flatten(self.fn(*args, **kwargs))
            traced = [i for i, x in enumerate(results) if is_traced(x)]
            for i, x in enumerate(results):
                if i not in traced:
                    _refuse_hidden(x)
            kept = [None if i in traced else x for i, x in enumerate(results)]
            outputs[:] = [Outputs(kept, treedef, traced)]
            return [results[i] for i in traced]

        closed = jax.make_jaxpr(run)(*avals)
        return closed, outputs[0]


def filling(treedef: Any, leaves: Sequence[Any], places: Sequence[int]) -> Callable[..., Any]:
    """Returns a function that puts values in the places of some leaves of a pytree."""

    def fill(values: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        return jax.tree.unflatten(treedef, filled)

    return fill


def is_traced(value: Any) -> bool:
    """Returns whether a value is an array, or what JAX traces of a type that it was told of."""
    return isinstance(value, jax.Array) or is_tracer(value)


def _refuse_hidden(value: Any) -> None:
    """Refuses an opaque object that holds traced arrays: they would leak out of the trace."""
    fields = getattr(value, "__dict__", None)
    if not isinstance(fields, dict):
        return
    for name, field in fields.items():
        if any(is_tracer(x) for x in jax.tree.leaves(field)):
            raise TypeError(
                f"adapt: the function returned a {type(value).__name__} whose field {name!r} holds "
                "arrays, and which is no pytree: register it with jax.tree_util.register_dataclass "
                "(or return its fields)"
            )
