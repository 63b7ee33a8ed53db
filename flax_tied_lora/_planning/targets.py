"""Targets: which tie groups a config names, by leaf, by call site, or by role."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import OTHER, module_path
from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.all_linear import ALL_LINEAR, all_linear
from flax_tied_lora._planning.axes import SITES_LINE
from flax_tied_lora._planning.matches import (
    Candidates,
    Hit,
    Hits,
    adaptable,
    part_names,
    stacked_hint,
)
from flax_tied_lora._planning.naming import by_path, by_role, by_scope, refuse_unread
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._tree.paths import (
    describe,
    dotted,
    ending_with,
    matches,
    module_of,
    nearby,
)

# How many names that mean nothing get a remedy: each costs a look at every name there is.
SHOWN = 10


class UnmatchedTargetWarning(UserWarning):
    """An entry of target_modules named nothing while others did, or a pattern is for no target."""

    __module__ = "flax_tied_lora"


def warn_unmatched(
    text: str, unmatched: Sequence[str], names: Callable[[], Iterable[str]], *, stacklevel: int,
    others: str = "So do",
) -> None:  # fmt: skip
    """Warns of names that mean nothing, the first of them one by one.

    Args:
      text: with a place for the name, and one for those nearby.
      names: returns what there is.
      stacklevel: of the caller's line, as `warnings.warn` has it.
      others: how a sentence on those that are not shown begins.
    """
    known = list(names()) if unmatched else []
    for number, name in enumerate(unmatched[:SHOWN], 1):
        more = len(unmatched) - SHOWN if number == SHOWN else 0
        warnings.warn(
            f"wrap: {text.format(name, ', '.join(map(repr, nearby(name, known))))}"
            + (f". {others} {more} more" if more > 0 else ""),
            UnmatchedTargetWarning,
            stacklevel=stacklevel + 1,
        )


def resolve(
    config: LoraConfig,
    leaves: Mapping[str, Any],
    groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> Hits:
    """Returns, for the key of each group that LoRA is for, the targets that name it.

    A target names a leaf or a module by its path; or a call site by its module scope, and so the
    leaf that is read there; or a role in a tied group (``embed_tokens``: lookup, ``lm_head``:
    projection). The first of these that names anything counts. ``target_parameters`` name leaves.

    Raises:
      ValueError: no target names anything, or one names only leaves that cannot be adapted.
    """
    by_leaf = {path: group for group in groups for path in group.paths}
    by_parameter = _parameters(config, leaves, by_leaf)
    targets = config.target_modules
    if targets is None or targets == ():
        if by_parameter or config.modules_to_save or config.trainable_token_indices:
            return by_parameter
        raise ValueError(
            "wrap: target_modules is None: say what to adapt, for example target_modules="
            f"{_examples(leaves)}"
        )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return by_parameter | all_linear(config, leaves, groups, sites)
    hits: dict[str, list[Hit]] = {}
    unmatched = []
    candidates = Candidates(config, leaves, sites)
    for target in (targets,) if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else (target,)
        among = candidates.leaves(target)
        named, refused = by_path(target, pattern, config, among, by_leaf, sites)
        # A tied head may have a leaf of its own that is no matrix: its bias.
        named = (
            named
            or by_scope(target, pattern, config, by_leaf, candidates.sites(target))
            or by_role(target, groups, sites)
        )
        if refused and not named:
            raise ValueError(
                f"wrap: {target!r} in target_modules names {', '.join(refused[:3])}; expected a "
                "floating-point matrix (two axes or more) that is multiplied or looked up. Take it "
                "out of target_modules; a matrix that is read otherwise is meant by its whole path"
            )
        if not named:
            unmatched.append(target)
        refuse_unread(target, named, by_leaf, groups, sites)
        for key, hit in named:
            hits.setdefault(key, []).append(hit)
    if not hits:
        text = _nothing_named("target_modules", targets, unmatched, leaves, sites)
        whole = isinstance(targets, str)
        few = unmatched[:SHOWN]
        hints = [stacked_hint(config, t, t if whole else (t,), leaves) for t in few]
        hints += [_parts_hint(config, t, leaves) for t in few]
        raise ValueError(text + next(filter(None, hints), ""))
    warn_unmatched(
        "{!r} in target_modules names no leaf, module or call site; nearby: {}",
        unmatched, lambda: _modules(leaves), stacklevel=6,
    )  # fmt: skip
    return by_parameter | {key: tuple(dict.fromkeys(named)) for key, named in hits.items()}


def named_groups(
    field: str, name: str, leaves: Mapping[str, Any], groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> Hits:  # fmt: skip
    """Returns the groups that a module's name means, or means a share of: by leaf, scope or role.

    All leaves of the module and of those inside it, and what is read in its scope though its leaf
    is elsewhere: the kernel of a tied head.

    Raises:
      ValueError: the name means nothing.
    """
    by_leaf = {path: group for group in groups for path in group.paths}
    hits: dict[str, list[Hit]] = {}
    inside = field == "modules_to_save"
    for path in leaves:
        module = _named_ancestor(name, path, inside)
        if module:
            hits.setdefault(by_leaf[path].key, []).append(Hit(name, module, leaf=path))
    for site in sites or ():
        scope = _named_ancestor(name, module_path(site.scope), inside)
        if scope and site.leaf in by_leaf and site.role != OTHER:
            key = by_leaf[site.leaf].key
            if key not in hits or all(h.scope for h in hits[key]):
                hits.setdefault(key, []).append(Hit(name, scope, scope=scope))
    for key, hit in by_role(name, groups, sites) if not hits else ():
        hits.setdefault(key, []).append(hit)
    if not hits:
        raise ValueError(_nothing_named(field, name, [name], leaves, sites))
    return {key: tuple(dict.fromkeys(named)) for key, named in hits.items()}


def _named_ancestor(name: str, path: str, inside: bool) -> str:
    """Returns the path, or the module around it, that a name means; "" if none is.

    Args:
      inside: whether a name may begin inside of a part, as in ``modules_to_save``: to
        ``peft.utils.other._set_trainable`` "norm" means every "input_layernorm", too.
    """
    while path and matches((name,), path) is None:
        if inside and dotted(path).endswith(dotted(name)):
            break
        path = module_of(path)
    return path


def _parameters(
    config: LoraConfig, leaves: Mapping[str, Any], by_leaf: Mapping[str, TieGroup]
) -> Hits:
    hits: dict[str, list[Hit]] = {}
    targets = as_tuple(config.target_parameters)
    by_target = ending_with(
        targets,
        (
            ((path, part), [f"{path}:{part}" if part else path])
            for path, leaf in (leaves.items() if targets else ())
            for part in ("", *part_names(config, path, leaf))
        ),
    )
    for target in targets:
        named = by_target[dotted(target)]
        if not named:
            raise ValueError(_nothing_named("target_parameters", target, [target], leaves, None))
        for path, part in named:
            if not adaptable(leaves[path]):
                raise ValueError(
                    f"wrap: {target!r} in target_parameters names {path!r} "
                    f"{describe(leaves[path])}; expected a floating-point matrix (two axes or "
                    "more). Take it out"
                )
            hits.setdefault(by_leaf[path].key, []).append(Hit(target, path, leaf=path, part=part))
    return {key: tuple(named_by) for key, named_by in hits.items()}


def _parts_hint(config: LoraConfig, target: str, leaves: Mapping[str, Any]) -> str:
    module, _, part = target.partition(":")
    for path, leaf in leaves.items() if part else ():
        named = matches((module,), path) or matches((module,), module_of(path))
        if named and adaptable(leaf):
            parts = part_names(config, path, leaf)
            listed = ", ".join(map(repr, parts)) or "none; name them in parts={...}"
            return f". The parts of {path!r} are {listed}"
    return ""


def _modules(leaves: Mapping[str, Any]) -> list[str]:
    return [module_of(p) or p for p, leaf in leaves.items() if adaptable(leaf)]


def _examples(leaves: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(m.rpartition("/")[2] for m in _modules(leaves)))[:4]


def _nothing_named(
    field: str, value: Any, unmatched: Sequence[str], leaves: Mapping[str, Any],
    sites: CallSites | None,
) -> str:  # fmt: skip
    names = _modules(leaves)
    close = [n for target in unmatched[:SHOWN] for n in nearby(target, names)]
    text = (
        f"wrap: {field}={value!r} names no leaf, module or call site; "
        f"nearby: {', '.join(map(repr, dict.fromkeys(close)))}"
    )
    if sites is None:
        text += (
            ". A module that has no leaf of its own, like an lm_head tied to the embedding, is "
            f"known from a trace: {SITES_LINE}; wrap(params, config, sites=sites)"
        )
    return text
