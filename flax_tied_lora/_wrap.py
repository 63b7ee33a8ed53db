"""`wrap`: params in, `Adapted` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapted import LORA, Adapted
from flax_tied_lora._axes import axes_of
from flax_tied_lora._config import LoraConfig
from flax_tied_lora._factors import DTYPE, boxes_of, make_factors, typed_key
from flax_tied_lora._paths import TiedLeaf, describe, flatten, is_marker
from flax_tied_lora._plan import GroupPlan, Plan
from flax_tied_lora._sites import CallSites
from flax_tied_lora._targets import Hit, adaptable, resolve, warn_of_unused_patterns
from flax_tied_lora._ties import DATA_FLOW, Member, TieGroup, ties_among


def wrap(
    params: Any,
    config: LoraConfig,
    *,
    sites: CallSites | None = None,
    ties: Any = "auto",
    rng: jax.Array | None = None,
) -> Adapted:
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
    leaves, treedef = _checked(params, config, sites)
    rng = jax.random.key(0) if rng is None else typed_key("wrap", rng)
    groups = _all_groups(leaves, ties_among(leaves, ties, sites=sites))
    for group in groups:
        _no_hidden_conflict(group, leaves)
    hits = resolve(config, leaves, groups, sites)
    warn_of_unused_patterns(config, hits)
    plans = tuple(
        _group_plan(group, leaves, config, hits.get(group.key, ()), sites)
        for group in groups
        if len(group.members) > 1 or group.key in hits
    )
    plan = Plan.of(plans, config)
    factors = make_factors(plan, leaves, boxes_of(params), rng)
    abstract = any(
        isinstance(x, jax.ShapeDtypeStruct) for g in plan.adapted for x in [leaves[g.key]]
    )
    names = {group.key: _pattern_name(hits[group.key]) for group in plan.adapted}
    if abstract:
        scaling = {key: jax.ShapeDtypeStruct((), DTYPE) for key in names}
    else:  # All in one go: one by one, ten thousand take a second.
        scaling = jax.device_put(
            {key: np.asarray(config.scaling_for(name), DTYPE) for key, name in names.items()}
        )
    return Adapted(stored_once(leaves, treedef, plan), {LORA: factors}, scaling, None, plan)


def _is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def _checked(params: Any, config: Any, sites: Any) -> tuple[dict[str, Any], Any]:
    if any(isinstance(x, Adapted) for x in jax.tree.leaves(params, is_leaf=_is_adapted)):
        raise TypeError(
            "wrap: these params are wrapped already; wrap tied_lora.base(adapted) for other "
            "adapters, or tied_lora.merge(adapted) to build on these"
        )
    if not isinstance(config, LoraConfig):
        raise TypeError(f"wrap: config is a {type(config).__name__}; expected a LoraConfig")
    if sites is not None and not isinstance(sites, CallSites):
        raise TypeError(f"wrap: sites is a {type(sites).__name__}; expected what trace returns")
    leaves, treedef = flatten(params)
    if not leaves:
        raise ValueError("wrap: params has no leaves; expected the params of an initialised model")
    for path, leaf in leaves.items():
        if is_marker(leaf):
            raise TypeError(
                f"wrap: {path!r} is a marker of a tie group: these are the params of an Adapted; "
                "wrap tied_lora.base(adapted) instead"
            )
    return leaves, treedef


def _all_groups(leaves: Mapping[str, Any], ties: Sequence[TieGroup]) -> list[TieGroup]:
    """Returns the tie groups, and a group of one for every leaf that is in none."""
    tied = {path for group in ties for path in group.paths}
    return [*ties, *(TieGroup((Member(path),)) for path in leaves if path not in tied)]


def _no_hidden_conflict(group: TieGroup, leaves: Mapping[str, Any]) -> None:
    first = leaves[group.key]
    for member in group.members[1:]:
        leaf = leaves[member.path]
        if getattr(leaf, "dtype", None) != getattr(first, "dtype", None):
            raise ValueError(
                f"wrap: {member.path!r} {describe(leaf)} is tied to {group.key!r} "
                f"{describe(first)}, which is of another dtype; cast one of them, or leave it out "
                "of ties=..."
            )


def _pattern_name(hits: Sequence[Hit]) -> str:
    return hits[0].module


def _group_plan(
    group: TieGroup, leaves: Mapping[str, Any], config: LoraConfig, hits: Sequence[Hit], sites: Any
) -> GroupPlan:
    leaf = leaves[group.key]
    common = (group.members, group.found, tuple(leaf.shape), str(jnp.dtype(leaf.dtype)))
    if not hits:
        return GroupPlan(*common)
    assert adaptable(leaf)
    axes = axes_of(group, leaf, sites)
    for what in (config.rank_for, config.scaling_for) if len(hits) > 1 else ():
        values = {hit.module: what(hit.module) for hit in hits}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"wrap: {group.key!r} is one tie group, and the patterns give it different values: "
                f"{values}; give its names the same rank and alpha"
            )
    rank = config.rank_for(_pattern_name(hits))
    limit = min(math.prod(leaf.shape[a] for a in side) for side in (axes.rows, axes.cols))
    if rank > limit:
        raise ValueError(
            f"wrap: rank {rank} for {group.key!r} {describe(leaf)}, which has rank {limit} at "
            "most; lower r, or give it a rank of its own in rank_pattern"
        )
    found = group.found if len(group.members) > 1 or DATA_FLOW in group.found else ()
    return GroupPlan(
        common[0], found, *common[2:], rank, axes.rows, axes.cols, axes.batch, axes.is_table,
        tuple(dict.fromkeys(hit.target for hit in hits)),
    )  # fmt: skip


def stored_once(leaves: Mapping[str, Any], treedef: Any, plan: Plan) -> Any:
    """Returns the params with a marker in place of every member but the canonical one."""
    markers = {
        member.path: TiedLeaf(group.key, member.transposed)
        for group in plan.groups
        for member in group.members[1:]
    }
    return jax.tree.unflatten(treedef, [markers.get(path, leaf) for path, leaf in leaves.items()])
