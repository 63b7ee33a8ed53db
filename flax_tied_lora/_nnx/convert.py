"""An adapted module from an `Adapted`, and an `Adapted` or plain params from a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_tied_lora._adapters.adapted import Adapted, check_adapted
from flax_tied_lora._nnx.checks import check_adapted_module, check_module
from flax_tied_lora._nnx.leaves import (
    aliases_of,
    check_aliases,
    params_of,
    set_leaves,
    variables_of,
)
from flax_tied_lora._nnx.module import (
    Adaptable,
    AdaptedModule,
    LoRADropout,
    Scaling,
    Slot,
    as_adapted,
)
from flax_tied_lora._planning.plan import LORA
from flax_tied_lora._tree.keys import key_number, typed_key
from flax_tied_lora._tree.paths import flatten, is_tracer
from flax_tied_lora._tree.processes import gathered


def from_adapted(
    module: Adaptable | AdaptedModule[Adaptable], adapted: Adapted
) -> AdaptedModule[Adaptable]:
    """Returns a module with the params and the adapters of an `Adapted`.

    For what `peft.load_adapter`, `checkpoint.restore`, `arithmetic` and `select` return; give them
    the module's params as `params` returns them.

    Raises:
      TypeError: not an `nnx.Module` and an `Adapted`.
      ValueError: the module does not have these params.

    Example::

      loaded = tied_lora.peft.load_adapter(path, tied_lora.nnx.params(model), names)
      adapted = tied_lora.nnx.from_adapted(model, loaded)
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("from_adapted", module)
    check_adapted("from_adapted", adapted)
    return assembled("from_adapted", nnx.clone(module), adapted, adapted.rng)


def adapted(module: AdaptedModule) -> Adapted:
    """Returns an adapted module's params, adapters and plan as an `Adapted`; nothing is copied.

    For `peft.save_adapter`, `checkpoint.save`, `arithmetic`. `from_adapted` is the way back.

    Raises:
      TypeError: not an adapted module.
    """
    check_adapted_module("adapted", module)
    return as_adapted(module)


def params(module: nnx.Module) -> dict[str, Any]:
    """Returns the params of a module as nested dicts, each Variable under every path that it has.

    `peft`, `checkpoint` and `names` take params in this form. Of an adapted module these are the
    frozen ones. Only `nnx.Param` Variables are in it, without those that another LoRA trains
    (`nnx.LoRAParam`).

    Raises:
      TypeError: not an `nnx.Module`.
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("params", module)
    return params_of(module)


def assembled(what: str, module: Adaptable, adapted: Adapted, rng: Any) -> AdaptedModule[Adaptable]:
    """Returns a module with the adapters of an `Adapted`; ``module`` is given its frozen params.

    Args:
      what: whose errors these are.
      module: is changed.
      rng: for the factors' dropout, or None.
    """
    plan = adapted.plan
    check_aliases(what, plan, aliases_of(module))
    leaves, _ = flatten(adapted.params)
    for group in plan.groups:
        for member in group.members[1:]:
            leaves[member.path] = leaves[group.key]
    # A transposed member keeps a separate array: a Variable has one layout.
    transposed = {m.path for g in plan.groups for m in g.members if m.transposed}
    leaves = {name: leaf for name, leaf in leaves.items() if name not in transposed}
    set_leaves(what, module, leaves)
    dropout = None
    if plan.config.lora_dropout:
        key = jax.random.key(0) if rng is None else typed_key(what, rng)
        dropout = LoRADropout(jax.random.fold_in(key, key_number("lora_dropout")))
        dropout.deterministic = adapted.rng is None
    scaling = _scalings(adapted)
    slot = None if adapted.slot is None else Slot(adapted.slot)
    return AdaptedModule(module, _variables(module, adapted), scaling, dropout, slot, plan)


def _scalings(adapted: Adapted) -> dict[str, Any]:
    """Returns scalings as static numbers where they are the config's, else as Variables.

    A Variable that is no factor would count as one of the base's: tunix compares these with the
    base model's to see whether both share them. A scaling of another value, as `arithmetic.scale`
    makes it, belongs to the module's state: a state without it could not bring it back.
    """
    plan = adapted.plan
    stated = {a.key: np.float32(plan.config.scaling_for(a.module)) for _, a in plan.adapters(LORA)}
    known = adapted.slot is None and not any(
        is_tracer(x) or isinstance(x, jax.ShapeDtypeStruct) or np.ndim(x)
        for x in adapted.scaling.values()
    )
    values = gathered(dict(adapted.scaling)) if known else {}
    if not known or any(np.asarray(x) != stated.get(key) for key, x in values.items()):
        return {key: Scaling(array) for key, array in adapted.scaling.items()}
    return stated


def _variables(module: nnx.Module, adapted: Adapted) -> dict[str, Any]:
    """Returns the adapters as `nnx.LoRAParam`, with partition names from the leaf's Variable."""
    variables, aliases = variables_of(module), aliases_of(module)
    result: dict[str, Any] = {
        kind: jax.tree.map(nnx.LoRAParam, tree) for kind, tree in adapted.adapters.items()
    }
    for group, adapter in adapted.plan.adapters():
        variable = variables.get(aliases.get(group.key, group.key))
        names = None if variable is None else variable.get_metadata("out_sharding", None)
        if not isinstance(names, tuple | jax.P):
            continue
        factors = result[adapter.kind][adapter.key]
        stack_axis = (None,) if adapted.slot is not None else ()
        for name, axes in group.axes(adapter).items():
            factor = factors[name] if name else factors
            factor.set_metadata(out_sharding=(*stack_axis, *_along(names, axes)))
    return result


def _along(names: Any, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the partition names of an array's axes, each an axis of the leaf or the rank."""
    return tuple(names[a] if isinstance(a, int) and a < len(names) else None for a in axes)
