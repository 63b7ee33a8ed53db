"""Ties: which leaves are one array, and how that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

from flax_tied_lora._algebra.site_filter import LOOKUP
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._ties.sources import (
    CONFIG,
    DATA_FLOW,
    DECLARED,
    EQUAL_VALUES,
    SAME_ARRAY,
    Member,
    TieGroup,
    by_value,
    declare,
    from_config,
    is_table,
    same_arrays,
)
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._tree.quantized_array import array_of


class TiedConfig(Protocol):
    """A model's config that says whether embedding and output projection are tied."""

    @property
    def tie_word_embeddings(self) -> Any: ...


# What `find_ties` takes for what is tied.
Ties = (
    Literal["auto"]
    | Sequence[tuple[str, ...] | list[str] | TieGroup]
    | Mapping[str, Any]
    | TiedConfig
)


def find_ties(
    params: Any, ties: Ties = "auto", *, sites: CallSites | None = None, equal_values: bool = False
) -> list[TieGroup]:
    """Returns the tie groups of a params pytree.

    Sources of truth: the same array object in two places; what is declared in ``ties``; a model
    config; equal values, also transposed (only where asked for: it reads the data); data flow: one
    leaf read at several call sites. Inside `jax.jit` two names of one array arrive as two
    tracers: find ties outside and pass them in.

    Args:
      params: any pytree of arrays, or of `jax.ShapeDtypeStruct`, with key paths.
      ties: ``"auto"``; or, in addition to what is found: a list of path pairs (orientation inferred
        from the shapes; ``(path, path, "transposed")`` or ``(path, path, "same")`` where both
        fit), a list of `TieGroup`, or a model's config, an object or a dict with
        ``tie_word_embeddings``. False there unties embedding and output projection.
      sites: call sites of the model, for ties by data flow.
      equal_values: whether to compare values. Arrays of one repeated value never count.

    Raises:
      ValueError: a declared leaf does not exist or its shape does not fit, or a config does not
        say which leaves it ties.
      TypeError: ``ties`` is none of the above.
    """
    return ties_among(flatten(params)[0], ties, sites=sites, equal_values=equal_values)


def all_groups(leaves: Iterable[str], ties: Sequence[TieGroup]) -> list[TieGroup]:
    """Returns the tie groups, and a group of one for every leaf that is in none."""
    tied = {path for group in ties for path in group.paths}
    return [*ties, *(TieGroup((Member(path),)) for path in leaves if path not in tied)]


def ties_among(
    leaves: Mapping[str, Any], ties: Any, *, sites: CallSites | None, equal_values: bool = False
) -> list[TieGroup]:
    """Returns the tie groups among leaves by path; see `find_ties`."""
    links = _Links(leaves)
    for paths in same_arrays(leaves):
        for path in paths[1:]:
            links.add(paths[0], path, False, SAME_ARRAY)
    if isinstance(ties, str):
        if ties != "auto":
            raise TypeError(
                f"find_ties: ties={ties!r}; expected 'auto', a list, or a model's config"
            )
    elif isinstance(ties, Mapping) or hasattr(ties, "tie_word_embeddings"):
        from_config(leaves, ties, links)
    elif isinstance(ties, Sequence):
        for entry in ties:
            declare(leaves, entry, links)
    else:
        raise TypeError(
            f"find_ties: ties is a {type(ties).__name__}; expected 'auto', a list of path pairs or "
            "TieGroups, or a model's config with tie_word_embeddings"
        )
    if equal_values:
        by_value(leaves, links)
    return links.groups(sites or CallSites())


class _Links:
    """Ties as they are found, joined into groups; each with an orientation and its sources."""

    def __init__(self, leaves: Mapping[str, Any]):
        self.leaves = leaves
        self.edges: list[tuple[str, str, bool, str]] = []

    def add(self, first: str, second: str, transposed: bool, source: str) -> None:
        self.edges.append((first, second, transposed, source))

    def remove(self, first: Iterable[str], second: Iterable[str]) -> None:
        a, b = set(first), set(second)
        self.edges = [
            e for e in self.edges if not ((e[0] in a and e[1] in b) or (e[0] in b and e[1] in a))
        ]

    def groups(self, sites: CallSites) -> list[TieGroup]:
        neighbours: dict[str, list[tuple[str, bool, str]]] = {}
        for first, second, transposed, source in self.edges:
            neighbours.setdefault(first, []).append((second, transposed, source))
            neighbours.setdefault(second, []).append((first, transposed, source))
        reads: dict[str, list[Any]] = {}
        for site in sites:
            reads.setdefault(site.leaf, []).append(site)
        result, seen = [], set()
        for path in self.leaves:
            if path in seen:
                continue
            flips, found, queue = {path: False}, set(), [path]
            while queue:
                here = queue.pop()
                for there, transposed, source in neighbours.get(here, ()):
                    found.add(source)
                    flip = flips[here] ^ transposed
                    if flips.setdefault(there, flip) != flip:
                        raise ValueError(
                            f"find_ties: {there!r} is tied to {path!r} both as it is and "
                            "transposed; check ties=..., or leave one of them out"
                        )
                    if there not in seen:
                        seen.add(there)
                        queue.append(there)
            seen.add(path)
            if sum(len(reads.get(p, ())) for p in flips) > 1:
                found.add(DATA_FLOW)
            if found:
                result.append(self._group(flips, found, reads))
        return result

    def _group(self, flips: dict[str, bool], found: set[str], reads: Mapping[str, Any]) -> TieGroup:
        def rank(path: str) -> tuple[bool, bool, bool]:
            looked_up = any(s.role == LOOKUP for s in reads.get(path, ()))
            return (
                isinstance(array_of(self.leaves[path]), jax.ShapeDtypeStruct),
                not looked_up,
                not is_table(path),
            )

        order = sorted(flips, key=rank)
        base = flips[order[0]]
        order_found = (SAME_ARRAY, DECLARED, CONFIG, EQUAL_VALUES, DATA_FLOW)
        return TieGroup(
            tuple(Member(p, flips[p] != base) for p in order),
            tuple(source for source in order_found if source in found),
        )
