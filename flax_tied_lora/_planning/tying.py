"""What `ensure_weight_tying` means: one adapter for a tie group, or one for each name.

None ties what is tied and says nothing. True and False are PEFT's, row by row of the tables on
weight tying in its LoRA reference: with its warnings (`WeightTyingWarning`) and errors.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION, SiteFilter
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._names.model_config import says_tied
from flax_tied_lora._planning.axes import SITES_LINE
from flax_tied_lora._planning.matches import Hit
from flax_tied_lora._planning.plan import Span
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.lost import dropped
from flax_tied_lora._ties.sources import CONFIG, is_table
from flax_tied_lora._tree.paths import leaf_name

_FLAG = "ensure_weight_tying"


class WeightTyingWarning(UserWarning):
    """`ensure_weight_tying` does not fit the model; or a leaf that its config ties is dropped."""

    __module__ = "flax_tied_lora"


@dataclasses.dataclass(frozen=True)
class Share:
    """What one adapter is for: all of a tie group, or a share of it; and the targets that name it.

    Attributes:
      hits: the targets.
      name: what it is called; "" for the whole group.
      members: the leaves that it has; () for all.
      sites: the call sites that it has; None for all.
      span: the part of a fused leaf that it is; None for all of the leaf.
    """

    hits: tuple[Hit, ...]
    name: str = ""
    members: tuple[str, ...] = ()
    sites: SiteFilter | None = None
    span: Span | None = None

    def key(self, group: TieGroup) -> str:
        """Key of the share's adapter."""
        return f"{group.key}:{self.name}" if self.name else group.key


def is_tied(group: TieGroup, sites: CallSites | None) -> bool:
    """Returns whether a group is several leaves, or one that is looked up and projected with."""
    roles = {s.role for s in (sites or CallSites()).of(*group.paths)}
    return len(group.members) > 1 or {LOOKUP, PROJECTION} <= roles


def warn_of_dropped(what: str, group: TieGroup, leaves: Mapping[str, Any], level: int) -> None:
    """Warns of leaves that a model's config ties, and whose own values are others.

    Args:
      what: the function that drops them.
      level: of the stack, up to the user's line: as in `warnings.warn`, from here.
    """
    for path in dropped(leaves, group) if CONFIG in group.found else ():
        warnings.warn(
            f"{what}: the model's config ties {path!r} to {group.key!r}, and its values are "
            f"others: {path!r} is dropped, and {group.key!r} read in its place, as right for one "
            "that a loader made at random. To keep it, pass "
            'ties={"tie_word_embeddings": False}',
            WeightTyingWarning,
            stacklevel=level,
        )


def says_untied(ties: Any) -> bool:
    """Returns whether what `wrap` was given for ``ties`` is a config of an untied model."""
    return says_tied(ties) is False


def shares_of(
    group: TieGroup, hits: Sequence[Hit], config: LoraConfig, sites: CallSites | None
) -> tuple[Share, ...]:
    """Returns the shares of a group that its targets ask adapters for: the whole, unless False."""
    if not hits:
        return ()
    if config.ensure_weight_tying is not False:
        return (Share(tuple(hits)),)
    named: dict[tuple[Any, Any], list[Hit]] = {}
    for hit in hits:
        named.setdefault(_meaning(group, hit, sites), []).append(hit)
    if list(named) == [((), None)]:
        return (Share(tuple(hits)),)
    shares, taken = [], set()
    for (members, where), alike in named.items():
        first = alike[0]
        is_regex = isinstance(config.target_modules, str) and first.target == config.target_modules
        # A regex names nothing by itself.
        name = first.module if is_regex or first.target in taken else first.target
        taken.add(name)
        shares.append(Share(tuple(alike), name, members, where))
    return tuple(shares)


def _meaning(
    group: TieGroup, hit: Hit, sites: CallSites | None
) -> tuple[tuple[str, ...], SiteFilter | None]:
    """Returns the members and the call sites that a target means.

    As in PyTorch a table's module is its lookups only; what else reads the table is another module.
    """
    used = [s for s in (sites or CallSites()).of(*group.paths) if s.role != OTHER]
    if hit.leaf:
        members = (hit.leaf,) if len(group.members) > 1 else ()
        sites_of_leaf = [s for s in used if not members or s.leaf in members]
        both = {LOOKUP, PROJECTION} <= {s.role for s in sites_of_leaf}
        return members, SiteFilter(role=LOOKUP) if both else None
    where = SiteFilter(scope=hit.scope) if hit.scope else SiteFilter(role=hit.role)
    meant = [s for s in used if _is_in(s, where)]
    for role in (LOOKUP, PROJECTION):
        # All lookups, or all projections: that holds where the model is called without scopes, too.
        if meant and meant == [s for s in used if s.role == role]:
            where = SiteFilter(role=role)
    return (), None if meant == used else where


def _is_in(site: CallSite, where: SiteFilter) -> bool:
    return where(site.role, site.scope)


def check_overlap(
    what: str, group: TieGroup, shares: Sequence[Share], sites: CallSites | None
) -> None:
    """Refuses two shares with a call site in common: only one array can stand in for another.

    Raises:
      ValueError: they do.
    """
    if sites is None or len(shares) < 2:
        return
    for site in sites.of(*group.paths):
        both = [
            p.name for p in shares
            if (not p.members or site.leaf in p.members) and (not p.sites or _is_in(site, p.sites))
        ]  # fmt: skip
        if len(both) > 1:
            raise ValueError(
                f"wrap: {' and '.join(map(repr, both))} in {what} both mean {site}; leave one out"
            )


def check_flag(
    config: LoraConfig, groups: Sequence[TieGroup], targeted: set[str], split: set[str],
    sites: CallSites | None, untied: bool,
) -> None:  # fmt: skip
    """Warns as PEFT does where the flag does not fit the model.

    Args:
      targeted: keys of the groups that get factors, a full copy or rows.
      split: those that get factors or a full copy, which False keeps apart.
      untied: whether the model's config says so.

    Raises:
      ValueError: True or False, and whether a targeted table is tied cannot be known.
    """
    flag = config.ensure_weight_tying
    if flag is None:
        return
    tied = [] if untied else [g for g in groups if is_tied(g, sites)]
    unknown = [
        g for g in groups
        if g.key in targeted and sites is None and not untied and not is_tied(g, sites)
        and is_table(g.key) and leaf_name(g.key) == "embedding"
    ]  # fmt: skip
    if unknown and not flag:
        raise ValueError(
            f"wrap: {_FLAG}={flag} needs to know whether {unknown[0].key!r} is tied, which its "
            f"call sites say: {SITES_LINE}; wrap(params, config, sites=sites). Or leave {_FLAG} at "
            "None, which ties what is tied"
        )
    adapted = [g for g in tied if g.key in targeted]
    if flag and unknown:
        return  # a table that may well be tied, and then is: there is nothing to warn of
    if flag and not tied:
        names = ", ".join(map(repr, sorted(targeted)[:3]))
        _warn(flag, f"nothing is tied in this model; {names} get adapters as they are")
    elif flag and not adapted:
        _warn(flag, f"{tied[0].key!r}, which is tied, is not adapted")
    elif not flag:
        for group in (g for g in adapted if g.key in split):
            _warn(
                flag,
                f"{group.key!r} is tied, and each name that means it gets an adapter of its own, "
                "for its call sites only; merge then needs untie=...",
            )


def _warn(flag: bool, problem: str) -> None:
    warnings.warn(f"wrap: {_FLAG}={flag}, and {problem}", WeightTyingWarning, stacklevel=7)
