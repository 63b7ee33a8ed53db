"""How a target names a tie group, and what can be targeted at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._algebra.site_filter import Role, module_path
from flax_tied_lora._config.axes_and_parts import parts_of_leaf
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._tree.paths import (
    describe,
    dotted,
    ending_with,
    layer_index,
    leaf_name,
    matches,
)


@dataclasses.dataclass(frozen=True)
class Hit:
    """A target that names a group, and how it does: one of leaf, scope and role.

    Attributes:
      target: as the user wrote it.
      module: by whose name; what patterns of ranks are matched against.
      leaf: path of the leaf that is named, or that the module named holds.
      scope: module path of the call sites that are named.
      role: of the call sites that are named.
      part: name of the part of a fused leaf that is named; "" for all of it.
    """

    target: str
    module: str
    leaf: str = ""
    scope: str = ""
    role: Role | None = None
    part: str = ""


Hits = dict[str, tuple[Hit, ...]]


def adaptable(leaf: Any) -> bool:
    """Returns whether a leaf can have factors: floating point, two axes or more."""
    return len(getattr(leaf, "shape", ())) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def part_names(config: LoraConfig, path: str, leaf: Any) -> Iterable[str]:
    """Returns the names of a fused leaf's parts."""
    return parts_of_leaf(config.parts, path, tuple(leaf.shape)) if adaptable(leaf) else ()


class Candidates:
    """What each of `target_modules` may name: of many listed names each is looked up, not tried.

    Attributes:
      config: it has the targets.
      every_leaf, every_site: what there is, which a regex has to be tried on.
    """

    def __init__(
        self, config: LoraConfig, leaves: Mapping[str, Any], sites: CallSites | None
    ) -> None:
        self.config, self.every_leaf, self.every_site = config, leaves, sites or CallSites()
        targets = config.target_modules
        self._is_regex = isinstance(targets, str)
        listed = () if self._is_regex or targets is None else targets
        self._paths = ending_with(listed, ((p, self._names(p)) for p in leaves if listed))
        self._sites = ending_with(
            listed, ((s, (s.scope, module_path(s.scope))) for s in self.every_site if listed)
        )

    def leaves(self, target: str) -> Mapping[str, Any]:
        """Returns the leaves that a target may name, by path."""
        if self._is_regex:
            return self.every_leaf
        return {p: self.every_leaf[p] for p in self._paths[dotted(target)]}

    def sites(self, target: str) -> Iterable[CallSite]:
        """Returns the call sites that a target may name."""
        return self.every_site if self._is_regex else self._sites[dotted(target)]

    def _names(self, path: str) -> list[str]:
        """Returns the names of a leaf, of its module, and of the parts of both."""
        names = [path, path.rpartition("/")[0]]
        parts = part_names(self.config, path, self.every_leaf[path])
        return names + [f"{name}:{part}" for name in names for part in parts]


def excluded(config: LoraConfig, *names: str) -> bool:
    """Returns whether `exclude_modules` names one of these."""
    return config.exclude_modules is not None and any(
        matches(config.exclude_modules, name) is not None for name in names
    )


def in_layer(config: LoraConfig, module: str) -> bool:
    """Returns whether `layers_to_transform` takes a module."""
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return True
    patterns = config.layers_pattern
    index = layer_index(module, (patterns,) if isinstance(patterns, str) else patterns)
    return index in ((wanted,) if isinstance(wanted, int) else wanted)


def by_part(module: str, count: int) -> str:
    """Returns a remedy: how to give some layers of a stacked leaf factors of their own."""
    last = module.rpartition("/")[2]
    return (
        f'Cut it into parts along the layers, parts={{"{last}": (0, {{"first": 1, "rest": '
        f'{count - 1}}})}}, and name one as "{last}:first"'
    )


def stacked_hint(config: LoraConfig, target: str, pattern: Any, leaves: Mapping[str, Any]) -> str:
    """Returns what to do where a target means a layer that is stacked with others in one leaf."""
    for path, leaf in leaves.items():
        module, shape = path.rpartition("/")[0], getattr(leaf, "shape", ())
        if len(shape) < 3 or not module or leaf_name(path) in ("bias", "scale"):
            continue
        layers = config.layers_to_transform is not None and matches(pattern, module)
        if layers or any(matches(pattern, name) for name in numbered(module, shape)):
            why = f"layers_to_transform={config.layers_to_transform}" if layers else repr(target)
            return (
                f". {path!r} {describe(leaf)} may hold several layers, which {why} does not tell "
                f"apart. {by_part(module, shape[0])}"
            )
    return ""


def numbered(module: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the names that layers of a stacked leaf would have, each with a leaf of its own."""
    if len(shape) < 3 or layer_index(module, None) is not None:
        return
    ends = [m.end() for m in re.finditer(r"[^/]+(?=/)", module)]
    for end in ends:
        for index in range(shape[0]):
            for sign in "/_":
                yield f"{module[:end]}{sign}{index}{module[end:]}"
                rest = module[end:].partition("/")[2].partition("/")[2]
                if rest:  # the name of the one layer inside of a scan goes away
                    yield f"{module[:end]}{sign}{index}/{rest}"
