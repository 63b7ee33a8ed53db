"""The plans of groups: each with the adapters that a config asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._config.checks import reads_weight
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.axes import Axes, axes_of, roles_of
from flax_tied_lora._planning.fused import fused_parts
from flax_tied_lora._planning.matches import Hit, Hits, adaptable
from flax_tied_lora._planning.plan import (
    BIAS,
    LORA,
    MODULES_TO_SAVE,
    TRAINABLE_TOKENS,
    AdapterPlan,
    GroupPlan,
    Plan,
)
from flax_tied_lora._planning.targets import named_groups, resolve
from flax_tied_lora._planning.tokens import TokenShares, token_shares, tokens_of
from flax_tied_lora._planning.tying import Share, check_flag, check_overlap, shares_of
from flax_tied_lora._planning.unused_patterns import check_patterns
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import DATA_FLOW, is_table
from flax_tied_lora._tree.paths import describe, is_marker, leaf_name, module_of


@dataclasses.dataclass
class Named:
    """What an adapter's file adapts, by leaf path, in place of what a config's names mean.

    Attributes:
      lora, saved, tokens: leaves with factors, full copies and replaced rows, and what names them.
      biases: leaves that are trained as they are.
    """

    lora: dict[str, list[Hit]]
    saved: dict[str, list[Hit]]
    tokens: dict[str, list[Hit]]
    biases: set[str]


def make_plan(
    config: LoraConfig, leaves: Mapping[str, Any], groups: Sequence[TieGroup],
    sites: CallSites | None, untied: bool, named: Named | None = None,
) -> Plan:  # fmt: skip
    """Returns the plan of what a config asks for.

    Args:
      leaves: the params, by path.
      groups: every leaf's tie group.
      sites: call sites of the model, if they are known.
      untied: whether the model's config says so.
      named: what is adapted, in place of what the config's names mean.
    """
    if named is None:
        lora = resolve(config, leaves, groups, sites)
        check_patterns(config, lora, leaves, groups, sites)
        saved: Hits = {}
        for name in config.modules_to_save or ():
            for key, hits in named_groups("modules_to_save", name, leaves, groups, sites).items():
                saved[key] = (*saved.get(key, ()), *hits)
        tokens = token_shares(config, leaves, groups, sites)
        biases = _biases(config, leaves, lora)
    else:
        lora, saved = by_group(named.lora, groups), by_group(named.saved, groups)
        tokens = tokens_of(config, by_group(named.tokens, groups), groups, sites)
        biases = named.biases
    check_flag(config, groups, {*lora, *saved, *tokens}, {*lora, *saved}, sites, untied)
    plans = [
        _group_plan(group, leaves[group.key], config, sites, lora.get(group.key, ()),
                    saved.get(group.key, ()), tokens, biases)
        for group in groups
    ]  # fmt: skip
    plan = Plan.of(tuple(p for p in plans if p is not None), config)
    if named is None:  # a file's factors are as they are: PEFT has no limit
        _check_ranks(plan)
    if lora and not any(True for _ in plan.adapters(LORA)):
        raise ValueError(
            f"wrap: all that target_modules={config.target_modules!r} names is in modules_to_save "
            f"{list(config.modules_to_save or ())}, which goes before it; take it out of one of "
            "them"
        )
    return plan


def _check_ranks(plan: Plan) -> None:
    for group, adapter in plan.adapters(LORA):
        limit = group.rank_limit(adapter)
        if adapter.rank > limit:
            raise ValueError(
                f"wrap: rank {adapter.rank} for {adapter.key!r} {group.dtype}"
                f"{list(group.shape_of(adapter))}, which has rank {limit} at most; lower r, or "
                "give it a rank of its own in rank_pattern"
            )


def by_group(hits: Mapping[str, Sequence[Hit]], groups: Sequence[TieGroup]) -> Hits:
    """Returns the hits of each group, by its key, from those of its leaves."""
    by_leaf = {path: group.key for group in groups for path in group.paths}
    by_key: Hits = {}
    for path, hits_of_leaf in hits.items():
        by_key[by_leaf[path]] = (*by_key.get(by_leaf[path], ()), *hits_of_leaf)
    return by_key


def _biases(config: LoraConfig, leaves: Mapping[str, Any], lora: Hits) -> set[str]:
    """Returns the leaves that `bias` makes trainable (``mark_only_adapters_as_trainable``)."""
    if config.bias == "all":
        named = {p for p in leaves if "bias" in p}
    elif config.bias == "lora_only":
        modules = {h.module for hits in lora.values() for h in hits}
        named = {p for p in leaves if leaf_name(p) == "bias" and module_of(p) in modules}
    else:
        return set()
    return {p for p in named if _is_floating(leaves[p])}


def _is_floating(leaf: Any) -> bool:
    return not is_marker(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _group_plan(
    group: TieGroup, leaf: Any, config: LoraConfig, sites: CallSites | None,
    lora: Sequence[Hit], saved: Sequence[Hit], tokens: TokenShares, biases: set[str],
) -> GroupPlan | None:  # fmt: skip
    rows = tokens.get(group.key, [])
    bias = not lora and not saved and not rows and biases & set(group.paths)
    if not (lora or saved or rows or bias or len(group.members) > 1):
        return None
    sources = group.found if len(group.members) > 1 or DATA_FLOW in group.found else ()
    axes = _axes(group, leaf, sites, config, needed=bool(lora or rows))
    copies = shares_of(group, saved, config, sites)
    # What is trained in full needs no delta: as in PEFT, modules_to_save goes before targets.
    copied = {(share.members, share.sites) for share in copies}
    deltas = [
        share for share in shares_of(group, lora, config, sites)
        if not {((), None), (share.members, share.sites)} & copied
    ]  # fmt: skip
    adapters = [
        *(
            _factors(group, leaf, axes, share, config)
            for delta in deltas for share in fused_parts(group, leaf, delta, config)
        ),
        *(_copy(group, leaf, share) for share in copies),
        *(_tokens(group, leaf, axes, share, tokens_of_share) for share, tokens_of_share in rows),
        *([AdapterPlan(BIAS, group.key, targets=(config.bias,))] if bias else []),
    ]  # fmt: skip
    check_overlap("modules_to_save", group, copies, sites)
    check_overlap("target_modules", group, deltas, sites)
    for delta in deltas if copies else ():
        check_overlap("target_modules and modules_to_save", group, [*copies, delta], sites)
    _check_kinds(group, adapters)
    return GroupPlan(
        group.members, sources, tuple(leaf.shape), str(jnp.dtype(leaf.dtype)), axes.rows,
        axes.cols, axes.batch, axes.is_table, tuple(adapters), roles_of(group, sites),
    )  # fmt: skip


def _axes(
    group: TieGroup, leaf: Any, sites: CallSites | None, config: LoraConfig, needed: bool
) -> Axes:
    """Returns a group's axes; none where they are not known, and not needed, as for a full copy."""
    try:
        if needed or adaptable(leaf):
            return axes_of(group, leaf, sites, config.axes)
    except ValueError:
        if needed:
            raise
    return Axes((), (), (), any(map(is_table, group.paths)))


def _factors(
    group: TieGroup, leaf: Any, axes: Axes, share: Share, config: LoraConfig
) -> AdapterPlan:
    hits, tail = share.hits, f":{share.name}" if share.span else ""
    module = hits[0].module + tail
    for what in (config.rank_for, config.scaling_for) if len(hits) > 1 else ():
        values = {hit.module: what(hit.module + tail) for hit in hits}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"wrap: {group.key!r} is one tie group, and the patterns give it different values: "
                f"{values}; give its names the same rank and alpha"
            )
    rank = config.rank_for(module)
    if config.use_dora and share.span:
        raise ValueError(
            f"wrap: use_dora scales all of {group.key!r}, and parts gives each of its parts "
            "factors of its own; leave one of the two out"
        )
    if config.use_dora and share.sites is not None:
        raise ValueError(
            f"wrap: use_dora scales all of {group.key!r}, and ensure_weight_tying=False wants an "
            f"adapter for {share.name!r} only. Tie them (None or True), or leave use_dora out"
        )
    return _adapter(
        LORA,
        group,
        share,
        rank=rank,
        dora=config.use_dora,
        residual=reads_weight(config.init_lora_weights) and not axes.is_table,
        module=module,
        span=share.span,
    )


def _copy(group: TieGroup, leaf: Any, share: Share) -> AdapterPlan:
    if not _is_floating(leaf):
        raise ValueError(
            f"wrap: {share.hits[0].target!r} in modules_to_save means {group.key!r} "
            f"{describe(leaf)}; expected floating point. Take it out of modules_to_save"
        )
    return _adapter(MODULES_TO_SAVE, group, share)


def _tokens(
    group: TieGroup, leaf: Any, axes: Axes, share: Share, tokens: tuple[int, ...]
) -> AdapterPlan:
    side = axes.rows if axes.is_table else axes.cols
    if len(side) != 1 or axes.batch:
        raise ValueError(
            f"wrap: trainable_token_indices for {group.key!r} {describe(leaf)}, whose rows "
            f"{axes.rows}, columns {axes.cols} and batch {axes.batch} axes are no table's; "
            "expected one axis of tokens"
        )
    count = leaf.shape[side[0]]
    outside = [t for t in tokens if t >= count]
    if outside:
        raise ValueError(
            f"wrap: {outside} in trainable_token_indices; {group.key!r} {describe(leaf)} has the "
            f"tokens 0 to {count - 1}. grow_vocabulary(params, {max(outside) + 1}) adds tokens"
        )
    return _adapter(TRAINABLE_TOKENS, group, share, tokens=tokens)


def _adapter(kind: str, group: TieGroup, share: Share, **fields: Any) -> AdapterPlan:
    targets = tuple(dict.fromkeys(hit.target for hit in share.hits))
    key = share.key(group)
    return AdapterPlan(kind, key, share.name, share.members, share.sites, targets=targets, **fields)


def _check_kinds(group: TieGroup, adapters: Sequence[AdapterPlan]) -> None:
    if len(adapters) < 2:
        return
    kinds = {a.kind for a in adapters}
    if {MODULES_TO_SAVE, TRAINABLE_TOKENS} <= kinds:
        fields, why = "modules_to_save and trainable_token_indices", "a full copy has all rows"
    elif {LORA, TRAINABLE_TOKENS} <= kinds and any(a.dora for a in adapters):
        fields, why = "target_modules and trainable_token_indices", "use_dora scales every row"
    else:
        return
    raise ValueError(
        f"wrap: {group.key!r} is named by {fields}, and {why}; take it out of one of them"
    )
