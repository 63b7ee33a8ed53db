"""Checks of arguments: modules, adapted ones, and methods."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_tied_lora._nnx.leaves import params_of
from flax_tied_lora._nnx.module import AdaptedModule

Method = str | Callable[..., Any] | None


def check_module(what: str, module: Any) -> None:
    """Raises unless it is an `nnx.Module` with params, of which no part is adapted already."""
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"{what}: expected an nnx.Module, got {type(module).__name__}. tied_lora.{what} takes "
            "params of other kinds, an nnx.State too"
            if what in ("wrap", "trace")
            else f"{what}: expected an nnx.Module, got {type(module).__name__}"
        )
    for path, node in nnx.iter_graph(module):
        if isinstance(node, AdaptedModule):
            where = "/".join(map(str, path))
            raise TypeError(
                f"{what}: {f'{where!r} in this module' if where else 'this module'} is adapted "
                "already; use tied_lora.nnx.base(module) for other adapters, or "
                "tied_lora.nnx.merge(module) to build on these"
            )
    if not params_of(module):
        raise ValueError(
            f"{what}: {type(module).__name__} has no nnx.Param; expected an initialised module"
        )


def check_adapted_module(what: str, module: Any) -> None:
    """Raises a TypeError unless it is an `AdaptedModule`."""
    if not isinstance(module, AdaptedModule):
        raise TypeError(
            f"{what}: expected an AdaptedModule, as tied_lora.nnx.wrap returns it, got "
            f"{type(module).__name__}"
        )


def method_of(what: str, module: nnx.Module, method: Method) -> Callable[..., Any]:
    """Returns a function of a module and the call's arguments, given what `trace` is given.

    Args:
      what: whose errors these are.
      module: whose method it is.
      method: as in `trace`.
    """
    if method is None:
        return lambda module, *args, **kwargs: module(*args, **kwargs)
    if callable(method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"{what}: method is a {type(method).__name__}; expected a method's name, or a function "
            "of the module and the arguments"
        )
    find = operator.attrgetter(method)
    if not callable(find(module)):
        raise TypeError(f"{what}: {method!r} of {type(module).__name__} is no method")
    return lambda module, *args, **kwargs: find(module)(*args, **kwargs)
