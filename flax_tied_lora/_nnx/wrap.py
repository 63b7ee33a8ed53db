"""`wrap` for an `nnx.Module`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import check_module
from flax_tied_lora._nnx.convert import assembled
from flax_tied_lora._nnx.leaves import aliases_of, params_of
from flax_tied_lora._nnx.module import Adaptable, AdaptedModule
from flax_tied_lora._planning.axes import SITES_LINE
from flax_tied_lora._planning.plan import LORA
from flax_tied_lora._planning.tying import says_untied
from flax_tied_lora._ties.find import Ties, find_ties
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._ties.sources import SAME_ARRAY
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
    ties = _with_aliases(params, aliases_of(module), ties)
    try:
        adapted = wrap_as(config, params, None, sites=sites, ties=ties, rng=rng)
    except ValueError as error:
        if sites is None and SITES_LINE in str(error):
            error.add_note("For an nnx.Module: sites = tied_lora.nnx.trace(module, tokens)")
        raise
    # Also of an abstract module: the scalings are numbers of the config's.
    scaling = {
        a.key: np.float32(config.scaling_for(a.module)) for _, a in adapted.plan.adapters(LORA)
    }
    return assembled("wrap", module, dataclasses.replace(adapted, scaling=scaling), rng)


def _with_aliases(params: Any, aliases: Mapping[str, str], ties: Any) -> Any:
    """Returns ties for `tied_lora.wrap`, to which Variables with several paths are added.

    `find_ties` sees that concrete arrays are one; of abstract Variables only the graph shows it.
    """
    leaves, _ = flatten(params)
    shared = [
        TieGroup((Member(first), Member(other)), (SAME_ARRAY,))
        for other, first in aliases.items() if isinstance(leaves[first], jax.ShapeDtypeStruct)
    ]  # fmt: skip
    if not shared or says_untied(ties):
        return ties
    return [*shared, *find_ties(params, ties)]
