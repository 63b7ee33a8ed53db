"""How one target names groups: by paths of leaves, by scopes of call sites, by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION, Role, module_path
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._planning.matches import Hit, adaptable, excluded, in_layer, part_names
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import is_table
from flax_tied_lora._tree.paths import describe, leaf_name, matches, module_of

# What Flax calls leaves that are added or multiplied in, entry by entry.
_VECTORS = ("bias", "scale")
# Names by which PEFT's users mean a role in a tied group, whatever its modules are called.
ROLES: dict[str, Role] = {"embed_tokens": LOOKUP, "lm_head": PROJECTION}


def by_path(
    target: str, pattern: Any, config: LoraConfig, leaves: Mapping[str, Any],
    by_leaf: Mapping[str, TieGroup], sites: CallSites | None,
) -> tuple[list[tuple[str, Hit]], list[str]]:  # fmt: skip
    """Returns the groups that are named; without any, the leaves named that are no matrix."""
    named, refused, left_out = [], [], False
    for path, leaf in leaves.items():
        module = module_of(path)
        for part in ("", *part_names(config, path, leaf)):
            tail = f":{part}" if part else ""
            whole = matches(pattern, path + tail) is not None
            if not whole and (not module or matches(pattern, module + tail) is None):
                continue
            if excluded(config, path, module, path + tail, module + tail) or not in_layer(
                config, module
            ):
                left_out |= adaptable(leaf)
            elif adaptable(leaf) and (whole or not _is_vector(path, by_leaf[path], sites)):
                hit = Hit(target, module or path, leaf=path, part=part)
                named.append((by_leaf[path].key, hit))
            else:
                refused.append(f"{path!r} {describe(leaf)}{_read_by(path, by_leaf[path], sites)}")
    return named, [] if named or left_out else refused


def _read_by(path: str, group: TieGroup, sites: CallSites | None) -> str:
    """Returns what reads a leaf, where these are no products and no lookups."""
    operations = dict.fromkeys(s.operation for s in (sites or CallSites()).of(*group.paths))
    return f", which is read by {', '.join(operations)} only" if operations else ""


def _is_vector(path: str, group: TieGroup, sites: CallSites | None) -> bool:
    """Returns whether a leaf is a bias or a scale, which a module's name does not mean.

    Those of attention heads and of stacked layers have two axes or more, as matrices do.
    """
    used = (sites or CallSites()).of(*group.paths)
    if used and not is_table(path):  # a table of positions is added
        return all(s.role == OTHER for s in used)
    return leaf_name(path) in _VECTORS


def by_scope(
    target: str, pattern: Any, config: LoraConfig, by_leaf: Mapping[str, TieGroup],
    sites: Iterable[CallSite],
) -> list[tuple[str, Hit]]:  # fmt: skip
    """Returns the groups of which a target names call sites by their module scopes."""
    named = []
    for site in sites:
        # "Model/embed_tokens.attend" is the module embed_tokens, in its method attend.
        scope = module_path(site.scope)
        names = [n for n in (site.scope, scope) if n]
        if site.leaf not in by_leaf or site.role == OTHER or excluded(config, *names, site.leaf):
            continue
        if any(matches(pattern, n) is not None for n in names) and in_layer(config, scope):
            named.append((by_leaf[site.leaf].key, Hit(target, scope, scope=scope)))
    return named


def by_role(
    target: str, groups: Sequence[TieGroup], sites: CallSites | None
) -> list[tuple[str, Hit]]:
    """Returns the tied groups of which a target means a role."""
    role = ROLES.get(target)
    if role is None:
        return []
    named = []
    for group in groups:
        roles = {s.role for s in (sites or CallSites()).of(*group.paths)}
        if {LOOKUP, PROJECTION} <= roles:
            named.append((group.key, Hit(target, target, role=role)))
    return named


def refuse_unread(
    target: str, named: Sequence[tuple[str, Hit]], by_leaf: Mapping[str, TieGroup],
    groups: Sequence[TieGroup], sites: CallSites | None,
) -> None:  # fmt: skip
    """Refuses a target all of whose leaves are read nowhere, as far as call sites are given.

    Raises:
      ValueError: it is so: a tied model may have kept the leaf of an untied head.
    """
    paths = [hit.leaf for _, hit in named]
    if not sites or not paths or not all(paths):
        return
    if any(sites.of(*by_leaf[path].paths) for path in paths):
        return
    tied = [key for key, _ in by_role(target, groups, sites)]
    instead = (
        f"{tied[0]!r} is read in its place: name that, or take {paths[0]!r} out of the params"
        if tied
        else "take it out of target_modules, or add the call sites of the function that reads it, "
        "sites | tied_lora.trace(...)"
    )
    raise ValueError(
        f"wrap: {target!r} in target_modules names {', '.join(map(repr, paths[:3]))}, which none "
        f"of the {len(sites)} call sites given reads: an adapter there would have no effect; "
        f"{instead}"
    )
