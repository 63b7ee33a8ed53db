"""What a config says of names that are not adapted: warned of, or refused where it means layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import module_path
from flax_tied_lora._config.axes_and_parts import parts_of_leaf
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._config.patterns import FrozenMapping, pattern_value
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.matches import Hits, by_part, numbered, part_names
from flax_tied_lora._planning.targets import warn_unmatched
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._tree.paths import (
    describe,
    dotted,
    ending_with,
    matches,
    module_of,
)

_NOTHING = object()


def check_patterns(
    config: LoraConfig, hits: Hits, leaves: Mapping[str, Any], groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> None:  # fmt: skip
    """Warns of each key of a config's mappings that is for no module adapted.

    So it does of what `exclude_modules` names in vain (``peft.tuners.tuners_utils.BaseTuner``).

    Raises:
      ValueError: a key is for one of the layers that are stacked in one leaf.
    """
    modules: dict[str, str] = {}
    for hit in (h for hits_of_group in hits.values() for h in hits_of_group):
        modules[hit.module] = hit.leaf
        parts = parts_of_leaf(config.parts, hit.leaf, leaves[hit.leaf].shape) if hit.leaf else {}
        modules |= {f"{hit.module}:{part}": "" for part in parts}
    for field in ("rank_pattern", "alpha_pattern"):
        mapping = getattr(config, field)
        unused = _unused(mapping, modules)
        for pattern in unused:
            _refuse_layer(field, {pattern: mapping[pattern]}, modules, leaves)
        _warn(field, unused, modules)
    paths = [path for group in groups if group.key in hits for path in group.paths]
    names = [name for path in paths for name in (path, module_of(path)) if name]
    for field in ("axes", "parts"):
        _warn(field, _unused(getattr(config, field), names), modules)
    _warn_of_exclusions(config, leaves, sites)


def _warn_of_exclusions(
    config: LoraConfig, leaves: Mapping[str, Any], sites: CallSites | None
) -> None:
    excluded = config.exclude_modules
    if not excluded:
        return
    names = [n for path in leaves for n in (path, module_of(path)) if n]
    parts = [(path, part_names(config, path, leaf)) for path, leaf in leaves.items()]
    names += [f"{n}:{x}" for path, of in parts for x in of for n in (path, module_of(path))]
    names += [n for s in sites or () for n in (s.scope, module_path(s.scope)) if n]
    if isinstance(excluded, str):
        vain = [] if any(matches(excluded, name) is not None for name in names) else [excluded]
    else:
        found = ending_with(excluded, ((name, [name]) for name in names))
        vain = [name for name in excluded if not found[dotted(name)]]
    warn_unmatched(
        "{!r} in exclude_modules names no leaf, module or call site, so nothing is excluded by it; "
        "nearby: {}",
        vain, lambda: names, stacklevel=7,
    )  # fmt: skip


def _unused(mapping: FrozenMapping[Any], names: Iterable[str]) -> list[str]:
    used = {p for name in names for p in mapping.index.matching(name)} if mapping else set()
    return [pattern for pattern in mapping if pattern not in used]


def _warn(field: str, unused: Sequence[str], modules: Mapping[str, str]) -> None:
    warn_unmatched(
        f"{{!r}} in {field} is for no module that is adapted; these are: {{}}",
        unused, lambda: modules, stacklevel=7, others="So are",
    )  # fmt: skip


def _refuse_layer(
    field: str, alone: Mapping[str, Any], modules: Mapping[str, str], leaves: Mapping[str, Any]
) -> None:
    for module, leaf in modules.items():
        if not leaf:
            continue
        shape = tuple(leaves[leaf].shape)
        for name in numbered(module, shape):
            if pattern_value(alone, name, _NOTHING) is not _NOTHING:
                raise ValueError(
                    f"wrap: {next(iter(alone))!r} in {field} is for one layer, and {leaf!r} "
                    f"{describe(leaves[leaf])} holds all of them, with factors of one rank. "
                    f"{by_part(module, shape[0])}"
                )
