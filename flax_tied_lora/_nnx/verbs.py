"""`wrap` for an `nnx.Module`, and the ways from it to an `Adapted` and back."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.merge import check_adapted
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import check_adapted_module, check_module
from flax_tied_lora._nnx.leaves import aliases_of, check_aliases, params_of, set_leaves
from flax_tied_lora._nnx.making import boxed, with_aliases
from flax_tied_lora._nnx.module import (
    Adaptable,
    AdaptedModule,
    LoRADropout,
    Scaling,
    Slot,
    as_adapted,
)
from flax_tied_lora._planning.axes import SITES_LINE
from flax_tied_lora._ties.find import Ties
from flax_tied_lora._tree.keys import key_number, typed_key
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.wrap import wrap_as


def wrap(
    module: Adaptable,
    config: LoraConfig,
    *,
    sites: CallSites | None = None,
    ties: Ties = "auto",
    rng: jax.Array | nnx.Rngs | nnx.RngStream | None = None,
) -> AdaptedModule[Adaptable]:
    """Returns a module with LoRA factors for every tie group that the config targets.

    Targets are matched against the paths of the module's `nnx.Param` Variables. A Variable that is
    reached by several paths (a shared Variable, a Variable of a shared submodule) is one tie group
    with one pair of factors, named by any of them. The module is left as it is: the result has
    Variables of its own, and shares their arrays.

    Args:
      module: any `nnx.Module`, abstract ones (`nnx.eval_shape`) too.
      config, sites, ties: as in `tied_lora.wrap`; sites are from `trace`.
      rng: a key, an `nnx.Rngs` or an `nnx.RngStream` for the factors and their dropout.

    Raises:
      TypeError: not an `nnx.Module`, or adapted already.
      ValueError: as `tied_lora.wrap`; or the paths of one Variable would get adapters of their own.

    Example::

      adapted = tied_lora.nnx.wrap(model, config)
      optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=nnx.LoRAParam)
      logits = adapted(tokens)
    """
    check_module("wrap", module)
    rng = rng() if isinstance(rng, nnx.Rngs | nnx.RngStream) else rng
    module = nnx.clone(module)
    params = params_of(module)
    ties = with_aliases(params, aliases_of(module), ties)
    try:
        adapted = wrap_as(config, params, None, sites=sites, ties=ties, rng=rng)
    except ValueError as error:
        if sites is None and SITES_LINE in str(error):
            error.add_note("For an nnx.Module: sites = tied_lora.nnx.trace(module, tokens)")
        raise
    return _assembled("wrap", module, adapted, rng)


def from_adapted(
    module: Adaptable | AdaptedModule[Adaptable], adapted: Adapted
) -> AdaptedModule[Adaptable]:
    """Returns a module with the adapters of an `Adapted` of its params, and with these params.

    For what `peft.load_adapter`, `checkpoint.restore`, `arithmetic` and `select` return; the params
    that they take are `params`'s.

    Raises:
      TypeError: not an `nnx.Module` and an `Adapted`.
      ValueError: the module has no such params.

    Example::

      loaded = tied_lora.peft.load_adapter(path, tied_lora.nnx.params(model), names)
      adapted = tied_lora.nnx.from_adapted(model, loaded)
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("from_adapted", module)
    check_adapted("from_adapted", adapted)
    return _assembled("from_adapted", nnx.clone(module), adapted, adapted.rng)


def _assembled(what: str, module: nnx.Module, adapted: Adapted, rng: Any) -> AdaptedModule:
    """Returns a module with adapters; the module is given the frozen params."""
    plan = adapted.plan
    check_aliases(what, plan, aliases_of(module))
    leaves, _ = flatten(adapted.params)
    for group in plan.groups:
        for member in group.members[1:]:
            leaves[member.path] = leaves[group.key]
    # A transposed member keeps an array of its own: a Variable has one layout.
    turned = {m.path for g in plan.groups for m in g.members if m.transposed}
    set_leaves(what, module, {name: leaf for name, leaf in leaves.items() if name not in turned})
    dropout = None
    if plan.config.lora_dropout:
        key = jax.random.key(0) if rng is None else typed_key(what, rng)
        dropout = LoRADropout(jax.random.fold_in(key, key_number("lora_dropout")))
        dropout.deterministic = adapted.rng is None
    scaling = {key: Scaling(array) for key, array in adapted.scaling.items()}
    slot = None if adapted.slot is None else Slot(adapted.slot)
    return AdaptedModule(module, boxed(module, adapted), scaling, dropout, slot, plan)


def params(module: nnx.Module) -> dict[str, Any]:
    """Returns the params of a module as nested dicts, each Variable under every path that it has.

    The form in which `peft`, `checkpoint` and `names` take params; for an adapted module, the
    frozen ones. What is no `nnx.Param`, and what another LoRA trains (`nnx.LoRAParam`), is not in
    it.

    Raises:
      TypeError: not an `nnx.Module`.
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("params", module)
    return params_of(module)


def adapted(module: AdaptedModule) -> Adapted:
    """Returns an adapted module's params, adapters and plan as an `Adapted`; nothing is copied.

    For `peft.save_adapter`, `checkpoint.save`, `arithmetic`. `from_adapted` is the way back.

    Raises:
      TypeError: not an adapted module.
    """
    check_adapted_module("adapted", module)
    return as_adapted(module)
