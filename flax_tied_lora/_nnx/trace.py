"""`trace` for an `nnx.Module`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import Method, check_module, method_of
from flax_tied_lora._nnx.leaves import named, params_of
from flax_tied_lora._nnx.module import AdaptedModule
from flax_tied_lora._nnx.scopes import with_scopes
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.trace import trace as _trace


def trace(module: nnx.Module, *args: Any, method: Method = None, **kwargs: Any) -> CallSites:
    """Returns the call sites of every param in a call of a module.

    Nothing is computed and the module is not changed; it and the arguments may be abstract.

    Args:
      module: a plain module; or an adapted one, for the call sites of its frozen module.
      *args: the call's arguments.
      method: what is called: the name of a method (``"encode"``, ``"embed.attend"``), or a function
        of the module and the arguments; default ``__call__``.
      **kwargs: the call's keyword arguments.

    Example::

      sites = tied_lora.nnx.trace(model, tokens)
      adapted = tied_lora.nnx.wrap(model, config, sites=sites)
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("trace", module)
    function = with_scopes(method_of("trace", module, method))
    graphdef, state = nnx.split(module)
    names, values, treedef = named(state)
    paths = flatten(params_of(module))[0].keys()
    leaves = dict(zip(names, values, strict=True))
    params = {name: leaf for name, leaf in leaves.items() if name in paths}
    others = {name: leaf for name, leaf in leaves.items() if name not in paths}

    def call(variables: Any, others: Any, args: Any, kwargs: Any) -> Any:
        values = {**others, **variables["params"]}
        inner = nnx.merge(graphdef, jax.tree.unflatten(treedef, [values[n] for n in names]))
        return function(inner, *args, **kwargs)

    return _trace(call, {"params": params}, others, args, kwargs)
