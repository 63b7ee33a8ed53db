"""What is known of the methods of a model object: which of them run it with params."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import jax

SAVES = ("save_pretrained",)  # These want arrays that exist: the merged params.


MAKES = ("init_weights",)  # Not run with params: makes them.


REFUSED = ("push_to_hub",)  # Saves the model's own params, and takes no others.


def runs(model: Any, name: str) -> bool:
    """Returns whether a method runs the model with params that it is given.

    It takes ``params``, or hands them on to the method that it overrides; not as its first
    argument: then they are what it works on.
    """
    if name in (*MAKES, *SAVES, *REFUSED):
        return False
    owners = (model, *(c for c in type(model).__mro__ if name in vars(c)))
    return any(_takes_params(owner, name) for owner in owners)


def _takes_params(owner: Any, name: str) -> bool:
    method = owner if name == "__call__" and not isinstance(owner, type) else None
    method = method or inspect.getattr_static(owner, name, None)
    try:
        names = list(inspect.signature(method).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # No function, or one that has no signature.
        return False
    if names and names[0] == "self":
        names = names[1:]
    return "params" in names[1:] or (name == "__call__" and "params" in names)


def without_params(model: Any) -> Any:
    """Returns a shallow copy of a model, with shapes in the place of its own params."""
    bare = copy.copy(model)
    try:
        params = model.params
    except (AttributeError, ValueError):  # It has none, or says that it has none.
        return bare
    try:
        bare.params = jax.eval_shape(lambda: params)
    except AttributeError as error:
        raise TypeError(
            f"AdaptedModel: {type(model).__name__}.params cannot be set, so its own params could "
            "run unadapted; use tied_lora.adapt on its methods"
        ) from error
    return bare


def settings(model: Any) -> tuple[str, ...]:
    """Returns what a call depends on besides its arguments, and people change in place."""
    parts = (getattr(model, name, None) for name in ("config", "generation_config"))
    return tuple(repr(getattr(part, "__dict__", None)) for part in parts)
