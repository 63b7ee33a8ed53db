"""What is refused in the place of a module."""

from __future__ import annotations

from typing import Any

from flax import nnx

from flax_tied_lora._nnx.leaves import params_of
from flax_tied_lora._nnx.module import AdaptedModule


def check_module(what: str, module: Any) -> None:
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
    if not isinstance(module, AdaptedModule):
        raise TypeError(
            f"{what}: expected an AdaptedModule, as tied_lora.nnx.wrap returns it, got "
            f"{type(module).__name__}"
        )
