"""Targets: which tie groups a config names, and which of their axes are rows and columns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._axes import SITES_LINE
from flax_tied_lora._config import LoraConfig
from flax_tied_lora._config_checks import pattern_value
from flax_tied_lora._paths import describe, layer_index, leaf_name, matches, module_of, nearby
from flax_tied_lora._sites import LOOKUP, OTHER, PROJECTION, CallSites
from flax_tied_lora._tie_sources import TieGroup

ALL_LINEAR = "all-linear"
# What Flax calls leaves that are added or multiplied in, entry by entry.
_VECTORS = ("bias", "scale")
_ROLES = {"embed_tokens": LOOKUP, "lm_head": PROJECTION}


class UnmatchedTargetWarning(UserWarning):
    """An entry of target_modules named nothing while others did, or a pattern is for no target."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A target that names a group, and the module by whose name it does."""

    target: str
    module: str


def adaptable(leaf: Any) -> bool:
    """Returns whether a leaf can have factors: floating point, two axes or more."""
    return len(getattr(leaf, "shape", ())) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def resolve(
    config: LoraConfig,
    leaves: Mapping[str, Any],
    groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> dict[str, tuple[Hit, ...]]:
    """Returns, for the key of each group that is targeted, the targets that name it.

    A target names a leaf or a module by its path; or a call site by its module scope, and so the
    leaf that is read there; or a role in a tied group (``embed_tokens``: lookup, ``lm_head``:
    projection). The first of these that names anything counts.

    Raises:
      ValueError: no target names anything, or one names only leaves that cannot be adapted.
    """
    targets = config.target_modules
    if targets is None:
        raise ValueError(
            "wrap: target_modules is None: say what to adapt, for example target_modules="
            f"{_examples(leaves)}"
        )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _all_linear(config, leaves, groups, sites)
    by_leaf = {path: group for group in groups for path in group.paths}
    hits: dict[str, list[Hit]] = {}
    unmatched = []
    for target in (targets,) if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else (target,)
        found, refused = _by_path(pattern, config, leaves, by_leaf, sites)
        # A tied head may have a leaf of its own that is no matrix: its bias.
        found = (
            found or _by_scope(pattern, config, by_leaf, sites) or _by_role(target, groups, sites)
        )
        if refused and not found:
            raise ValueError(
                f"wrap: {target!r} in target_modules names {', '.join(refused[:3])}; expected a "
                "floating-point matrix (two axes or more). Take it out of target_modules"
            )
        if not found:
            unmatched.append(target)
        for key, module in found:
            hits.setdefault(key, []).append(Hit(target, module))
    if not hits:
        raise ValueError(_nothing(config, unmatched, leaves, sites))
    for target in unmatched:
        warnings.warn(
            f"wrap: {target!r} in target_modules names no leaf, module or call site; nearby: "
            f"{', '.join(map(repr, nearby(target, _modules(leaves))))}",
            UnmatchedTargetWarning,
            stacklevel=4,
        )
    return {key: tuple(dict.fromkeys(found)) for key, found in hits.items()}


def warn_of_unused_patterns(config: LoraConfig, hits: Mapping[str, Sequence[Hit]]) -> None:
    """Warns of each key of rank_pattern and alpha_pattern that is for no module targeted."""
    modules = [hit.module for found in hits.values() for hit in found]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(config, field).items():
            nothing = object()
            alone = {pattern: value}
            if all(pattern_value(alone, m, nothing) is nothing for m in modules):
                warnings.warn(
                    f"wrap: {pattern!r} in {field} is for no module that is adapted; these are: "
                    f"{', '.join(map(repr, nearby(pattern, modules)))}",
                    UnmatchedTargetWarning,
                    stacklevel=3,
                )


def _modules(leaves: Mapping[str, Any]) -> list[str]:
    return [module_of(p) or p for p, leaf in leaves.items() if adaptable(leaf)]


def _examples(leaves: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(m.rpartition("/")[2] for m in _modules(leaves)))[:4]


def _excluded(config: LoraConfig, *names: str) -> bool:
    return config.exclude_modules is not None and any(
        matches(config.exclude_modules, name) is not None for name in names
    )


def _in_layer(config: LoraConfig, module: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return True
    patterns = config.layers_pattern
    index = layer_index(module, (patterns,) if isinstance(patterns, str) else patterns)
    return index in ((wanted,) if isinstance(wanted, int) else wanted)


def _by_path(
    pattern: Any, config: LoraConfig, leaves: Mapping[str, Any], by_leaf: Mapping[str, TieGroup],
    sites: CallSites | None,
) -> tuple[list[tuple[str, str]], list[str]]:  # fmt: skip
    """Returns the groups that are named, and what is named in their place but is no matrix."""
    found, refused, left_out = [], [], False
    for path, leaf in leaves.items():
        module = module_of(path)
        whole = matches(pattern, path) is not None
        if not whole and (not module or matches(pattern, module) is None):
            continue
        if _excluded(config, path, module) or not _in_layer(config, module):
            left_out |= adaptable(leaf)
        elif adaptable(leaf) and (whole or not _is_vector(path, by_leaf[path], sites)):
            found.append((by_leaf[path].key, module or path))
        else:
            refused.append(f"{path!r} {describe(leaf)}")
    return found, [] if found or left_out else refused


def _is_vector(path: str, group: TieGroup, sites: CallSites | None) -> bool:
    """Returns whether a leaf is a bias or a scale, which a module's name does not mean.

    Those of attention heads and of stacked layers have two axes or more, as matrices do.
    """
    used = (sites or CallSites()).of(*group.paths)
    if used:
        return all(s.role == OTHER for s in used)
    return leaf_name(path) in _VECTORS


def _by_scope(
    pattern: Any, config: LoraConfig, by_leaf: Mapping[str, TieGroup], sites: CallSites | None
) -> list[tuple[str, str]]:
    found = []
    for site in sites or ():
        # "Model/embed_tokens.attend" is the module embed_tokens, in its method attend.
        scope = "/".join(part.partition(".")[0] for part in site.scope.split("/"))
        names = [n for n in (site.scope, scope) if n]
        if site.leaf not in by_leaf or site.role == OTHER or _excluded(config, *names, site.leaf):
            continue
        if any(matches(pattern, n) is not None for n in names) and _in_layer(config, scope):
            found.append((by_leaf[site.leaf].key, scope))
    return found


def _by_role(
    target: str, groups: Sequence[TieGroup], sites: CallSites | None
) -> list[tuple[str, str]]:
    role = _ROLES.get(target)
    if role is None:
        return []
    found = []
    for group in groups:
        roles = {s.role for s in (sites or CallSites()).of(*group.paths)}
        if {LOOKUP, PROJECTION} <= roles:
            found.append((group.key, target))
    return found


def _all_linear(
    config: LoraConfig,
    leaves: Mapping[str, Any],
    groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> dict[str, tuple[Hit, ...]]:
    """Every leaf that is multiplied with data, but for the output projection, as PEFT has it."""
    if sites is None:
        raise ValueError(
            f'wrap: target_modules="{ALL_LINEAR}" needs to know which leaves are multiplied with '
            f"data, a fact of the traced model: {SITES_LINE}; wrap(params, config, sites=sites)"
        )
    by_leaf = {path: group for group in groups for path in group.paths}
    kinds: dict[str, set[str]] = {}
    for site in sites:
        if site.leaf in by_leaf:
            kinds.setdefault(by_leaf[site.leaf].key, set()).add(site.role)
    output = _output_projection(leaves, by_leaf, sites)
    hits = {}
    for site in sites:
        if site.leaf not in by_leaf or site.operation == "conv_general_dilated":
            continue
        key = by_leaf[site.leaf].key
        if kinds[key] & {PROJECTION} and LOOKUP not in kinds[key] and key != output:
            if not adaptable(leaves[site.leaf]) or _excluded(
                config, site.leaf, module_of(site.leaf)
            ):
                continue
            hits[key] = (Hit(str(config.target_modules), module_of(site.leaf) or site.leaf),)
    if not hits:
        raise ValueError(
            f'wrap: target_modules="{ALL_LINEAR}" found no leaf that is multiplied with data in '
            f"the {len(sites)} call sites given; are they of this model?"
        )
    return hits


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


def _nothing(
    config: LoraConfig, unmatched: Sequence[str], leaves: Mapping[str, Any], sites: CallSites | None
) -> str:
    names = _modules(leaves)
    near = [n for target in unmatched for n in nearby(target, names)]
    text = (
        f"wrap: target_modules={config.target_modules!r} names no leaf, module or call site; "
        f"nearby: {', '.join(map(repr, dict.fromkeys(near)))}"
    )
    if sites is None:
        text += (
            ". A module that has no leaf of its own, like an lm_head tied to the embedding, is "
            f"known from a trace: {SITES_LINE}; wrap(params, config, sites=sites)"
        )
    return text
