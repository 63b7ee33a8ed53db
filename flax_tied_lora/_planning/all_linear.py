"""``"all-linear"``: every leaf that is multiplied with data, but for the output layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION, module_path
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._planning.axes import SITES_LINE, in_canonical_layout, read_as_table
from flax_tied_lora._planning.matches import Hit, Hits, adaptable, excluded
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._tree.paths import module_of

ALL_LINEAR = "all-linear"


def all_linear(
    config: LoraConfig,
    leaves: Mapping[str, Any],
    groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> Hits:
    """Returns every leaf that is multiplied with data, but for the output projection, as in PEFT.

    Raises:
      ValueError: the call sites are not known, or there is no such leaf.
    """
    if sites is None:
        raise ValueError(
            f'wrap: target_modules="{ALL_LINEAR}" needs to know which leaves are multiplied with '
            f"data, a fact of the traced model: {SITES_LINE}; wrap(params, config, sites=sites)"
        )
    by_leaf = {path: group for group in groups for path in group.paths}
    by_key: dict[str, list[CallSite]] = {}
    for site in sites:
        if site.leaf in by_leaf:
            by_key.setdefault(by_leaf[site.leaf].key, []).append(site)
    kinds = {g.key: _roles(g, by_key[g.key]) for g in groups if g.key in by_key}
    # Where a table is read both ways, it is the output projection, and no other leaf is.
    tied = any({LOOKUP, PROJECTION} <= roles for roles in kinds.values())
    output = None if tied else _output_projection(leaves, by_leaf, sites)
    hits = {}
    for site in sites:
        if site.leaf not in by_leaf or site.operation == "conv_general_dilated":
            continue
        key = by_leaf[site.leaf].key
        if kinds[key] & {PROJECTION} and LOOKUP not in kinds[key] and key != output:
            names = (site.leaf, module_of(site.leaf), site.scope, module_path(site.scope))
            if not adaptable(leaves[site.leaf]) or excluded(config, *filter(None, names)):
                continue
            module = module_of(site.leaf) or site.leaf
            hits[key] = (Hit(str(config.target_modules), module, leaf=site.leaf),)
    if not hits:
        raise ValueError(
            f'wrap: target_modules="{ALL_LINEAR}" found no leaf that is multiplied with data in '
            f"the {len(sites)} call sites given; are they of this model?"
        )
    return hits


def _roles(group: TieGroup, sites: Sequence[CallSite]) -> set[str]:
    """Returns the roles that a group is read in; a kernel fed one-hot data is multiplied."""
    roles = {s.role for s in sites}
    used = in_canonical_layout(group, sites)
    if LOOKUP in roles and not read_as_table(group, used):
        roles = (roles - {LOOKUP}) | {PROJECTION}
    return roles


def _output_projection(
    leaves: Mapping[str, Any], by_leaf: Mapping[str, TieGroup], sites: CallSites
) -> str | None:
    """Returns the group of the last projection, if it makes one column for each row of a table."""
    tables = {
        leaves[s.leaf].shape[s.rows[0]]
        for s in sites
        if s.role == LOOKUP and s.leaf in by_leaf and len(s.rows) == 1
    }
    for site in reversed(sites.sites):
        if site.role == PROJECTION and site.leaf in by_leaf and adaptable(leaves[site.leaf]):
            columns = [leaves[site.leaf].shape[a] for a in site.cols]
            return by_leaf[site.leaf].key if len(columns) == 1 and columns[0] in tables else None
    return None
