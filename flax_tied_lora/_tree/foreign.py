"""Objects of other libraries, told apart without importing these: models, modules, arrays."""

from __future__ import annotations

import sys
from typing import Any

import jax

from flax_tied_lora._tree.paths import path_name


def refuse_models(what: str, params: Any, of_module: str | None = None) -> None:
    """Refuses a model where its params belong, which would be a pytree without a leaf of use.

    Args:
      of_module: what to do with an `nnx.Module`: how the error ends, from its comma on; None
        where one will do, being a pytree of its params.

    Raises:
      TypeError: it is one.
    """
    kind = type(params).__name__
    if isinstance(params, loaded_type("flax.nnx", "Module")):
        if of_module is None:
            return
        raise TypeError(f"{what}: expected params, got {kind}, an nnx.Module{of_module}")
    if not jax.tree_util.all_leaves([params]) or hasattr(params, "shape"):
        return
    if isinstance(params, loaded_type("flax.linen", "Module")):
        made = "what its init returns under 'params'"
        raise TypeError(f"{what}: expected params, got {kind}, a Flax module; pass {made}")
    if hasattr(params, "params"):
        raise TypeError(f"{what}: expected params, got {kind}, a model; pass model.params")


def loaded_type(library: str, name: str) -> Any:
    """Returns a class of a module for `isinstance`, or ``()``, of which nothing is an instance.

    Where the module is not imported nobody has an object of it, and importing it takes a while.
    """
    return getattr(sys.modules.get(library), name, ())


def quantized_by_qwix(params: Any) -> list[str]:
    """Returns the paths of the leaves that are qwix's own quantised arrays."""
    kind = loaded_type("qwix", "QArray")
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, kind))
    return [path_name(p).removesuffix("/array") for p, x in pairs if isinstance(x, kind)]
