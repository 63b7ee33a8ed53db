"""`wrap`: params in, `Adapted` out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted, Params, is_adapted
from flax_tied_lora._adapters.init_from_weight import start_from_weights
from flax_tied_lora._adapters.make import DTYPE, make_adapters
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.all_linear import ALL_LINEAR
from flax_tied_lora._planning.build import Named, make_plan
from flax_tied_lora._planning.plan import LORA, Plan
from flax_tied_lora._planning.tying import WeightTyingWarning, says_untied, warn_of_dropped
from flax_tied_lora._ties.find import Ties, all_groups, ties_among
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.twins import tables, twin_of
from flax_tied_lora._tree.boxes import boxes_of
from flax_tied_lora._tree.collector import collector_paused
from flax_tied_lora._tree.foreign import quantized_by_qwix, refuse_models
from flax_tied_lora._tree.keys import typed_key
from flax_tied_lora._tree.paths import (
    TiedLeaf,
    describe,
    flatten,
    matches,
    module_of,
    nearby,
    refuse_markers,
)
from flax_tied_lora._tree.quantized_array import array_of


def wrap(
    params: Params,
    config: LoraConfig,
    *,
    sites: CallSites | None = None,
    ties: Ties = "auto",
    rng: jax.Array | None = None,
) -> Adapted[Params]:
    """Returns params with LoRA factors for every tie group that the config targets.

    Follows ``peft.get_peft_model``; the params are left as they are, and nothing is added to them:
    `adapt` makes a model take the result where it took params.

    Args:
      params: any pytree of arrays with key paths (dict, FrozenDict, ``nnx.State``, boxed leaves),
        or of `jax.ShapeDtypeStruct`; then the factors are abstract too.
      config: what to adapt, and how.
      sites: call sites of the model, from `trace`. Needed for leaves of more than two axes, for
        ``"all-linear"``, and for targets that have no leaf of their own, like a tied ``lm_head``.
      ties: as in `find_ties`.
      rng: key for the factors, default ``jax.random.key(0)``; each group's key is folded into it,
        so the order of targets never matters.

    Returns:
      An `Adapted`. ``lora_a`` is [batch..., rows..., r] and ``lora_b`` [batch..., r, cols...] in
      the leaf's own layout, both float32; rows and columns are those of the call sites (rows of a
      table are what is picked, of a kernel what is summed over), else the two axes in order.

    Raises:
      ValueError: no target names anything, a declared tie does not fit, a rank is above what the
        matrix can hold, a leaf's axes are not known or used in two incompatible ways.
      TypeError: ``params`` is wrapped already, or an argument is of the wrong type.

    Example::

      config = tied_lora.LoraConfig(r=8, lora_alpha=16, target_modules=["embed_tokens", "q_proj"])
      adapted = tied_lora.wrap(params, config)
    """
    return wrap_as(config, params, None, sites=sites, ties=ties, rng=rng)


@collector_paused()
def wrap_as(
    config: LoraConfig, params: Params, named: Named | None, *, sites: CallSites | None,
    ties: Ties, rng: jax.Array | None = None,
) -> Adapted[Params]:  # fmt: skip
    """Returns what `wrap` returns; ``named`` says what is adapted in the config's place."""
    leaves, treedef = _checked(params, config, sites)
    rng = jax.random.key(0) if rng is None else typed_key("wrap", rng)
    groups = all_groups(leaves, ties_among(leaves, ties, sites=sites))
    for group in groups:
        _check_dtypes(group, leaves)
        warn_of_dropped("wrap", group, leaves, 5)
    plan = make_plan(config, leaves, groups, sites, says_untied(ties), named)
    if ties == "auto":
        _warn_of_twins(plan, leaves)
    scalings = {a.key: config.scaling_for(a.module) for _, a in plan.adapters(LORA)}
    adapters = make_adapters(plan, leaves, boxes_of(params), rng)
    abstract = any(isinstance(array_of(leaves[g.key]), jax.ShapeDtypeStruct) for g in plan.adapted)
    if abstract:
        scaling = {key: jax.ShapeDtypeStruct((), DTYPE) for key in scalings}
    else:  # All in one go: one by one, ten thousand take a second.
        scaling = jax.device_put({k: np.asarray(s, DTYPE) for k, s in scalings.items()})
    adapters, leaves = start_from_weights(plan, adapters, leaves, scalings, rng)
    return Adapted(stored_once(leaves, treedef, plan), adapters, scaling, None, plan)


def _checked(params: Any, config: Any, sites: Any) -> tuple[dict[str, Any], Any]:
    refuse_models("wrap", params, "; use tied_lora.nnx.wrap(module, config)")
    if any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted))):
        raise TypeError(
            "wrap: these params are wrapped already; wrap tied_lora.base(adapted) for other "
            "adapters, or tied_lora.merge(adapted) to build on these"
        )
    if not isinstance(config, LoraConfig):
        raise TypeError(f"wrap: config is a {type(config).__name__}; expected a LoraConfig")
    if sites is not None and not isinstance(sites, CallSites):
        raise TypeError(f"wrap: sites is a {type(sites).__name__}; expected what trace returns")
    _refuse_qwix(params, config)
    leaves, treedef = flatten(params)
    if not leaves:
        raise ValueError("wrap: params has no leaves; expected the params of an initialised model")
    refuse_markers("wrap", leaves, "wrap tied_lora.base(adapted) instead")
    unknown = [s for s in sites or () if s.leaf not in leaves]
    if unknown:
        raise ValueError(
            f"wrap: the call sites given read {unknown[0].leaf!r}, which is no leaf of params; "
            f"nearby: {', '.join(map(repr, nearby(unknown[0].leaf, leaves)))}. Trace the function "
            "with these params, as the argument that is called params"
        )
    return leaves, treedef


def _refuse_qwix(params: Any, config: LoraConfig) -> None:
    targets = config.target_modules or ()
    for path in quantized_by_qwix(params):
        named = targets == ALL_LINEAR or matches(targets, path) or matches(targets, module_of(path))
        if named:
            raise ValueError(
                f"wrap: target_modules names {path!r}, which qwix has quantised: its layers "
                "multiply with the integers themselves, where nothing can be added. Wrap the "
                "floating-point params of the model as it was, quantised by tied_lora.quantize, or "
                "leave it out of target_modules"
            )


def _check_dtypes(group: TieGroup, leaves: Mapping[str, Any]) -> None:
    first = leaves[group.key]
    for member in group.members[1:]:
        leaf = leaves[member.path]
        if getattr(leaf, "dtype", None) != getattr(first, "dtype", None):
            raise ValueError(
                f"wrap: {member.path!r} {describe(leaf)} is tied to {group.key!r} "
                f"{describe(first)}, which is of another dtype; cast one of them, or leave it out "
                "of ties=..."
            )


def _warn_of_twins(plan: Plan, leaves: Mapping[str, Any]) -> None:
    named = tables(leaves)
    for group in plan.adapted:
        among = leaves if group.is_table else named
        twin = twin_of(leaves, group.key, [m.path for m in group.members], among)
        if twin is not None:
            warnings.warn(
                f"wrap: {twin!r} has the values of {group.key!r} and is another array, as where a "
                "loader copied what is tied: it gets no part of the adapter. Tie them by "
                f'ties=[("{group.key}", "{twin}")]; if they are two, say so by ties=[]',
                WeightTyingWarning,
                stacklevel=5,
            )


def stored_once(leaves: Mapping[str, Any], treedef: Any, plan: Plan) -> Any:
    """Returns the params with a marker in place of every member but the canonical one."""
    markers = {
        member.path: TiedLeaf(group.key, member.transposed)
        for group in plan.groups
        for member in group.members[1:]
    }
    return jax.tree.unflatten(treedef, [markers.get(path, leaf) for path, leaf in leaves.items()])
