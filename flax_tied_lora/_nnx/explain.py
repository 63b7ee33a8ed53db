"""`explain` for an adapted module."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._nnx.checks import Method, check_adapted_module, method_of
from flax_tied_lora._nnx.leaves import aliases_of
from flax_tied_lora._nnx.module import AdaptedModule, evaluated_call
from flax_tied_lora._nnx.scopes import with_scopes
from flax_tied_lora._verbs.explain import Explanation, explained


def explain(module: AdaptedModule, *args: Any, method: Method = None, **kwargs: Any) -> Explanation:
    """Returns every call site of every adapted group in a call, and how each is served.

    Nothing is computed and the module is not changed; it and the arguments may be abstract. A
    Variable with several paths is shown by the one that is its group's key.

    Args:
      module: an adapted module.
      *args, method, **kwargs: as in `trace`.

    Raises:
      TypeError: not an adapted module.

    Example::

      tied_lora.nnx.explain(adapted, tokens).assert_tied()
    """
    check_adapted_module("explain", module)
    function = with_scopes(method_of("explain", module.module, method))
    graphdef, state = nnx.split(module)

    def reads_of(args: Any, kwargs: Any) -> Any:
        state, *args = args
        inner = nnx.merge(graphdef, state)
        _, done = evaluated_call(inner, function, Context("allow", counts=True), args, kwargs)
        return done.context.reads, done.adapteds

    explanation = explained(reads_of, (state, *args), kwargs)
    aliases = aliases_of(module.module)
    groups = []
    for group in explanation.groups:
        # By which of its paths a Variable was read cannot be known, so one of them is shown.
        members = {aliases.get(m.path, m.path): m for m in reversed(group.members)}
        kept = tuple(m for m in group.members if m in members.values())
        groups.append(dataclasses.replace(group, members=kept))
    return dataclasses.replace(explanation, groups=tuple(groups))
