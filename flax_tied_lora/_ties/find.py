"""Ties: which leaves are one array, and how that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

from flax_tied_lora._algebra.site_filter import LOOKUP
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._names.model_config import TIED
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._ties.lost import from_names, refuse_lost
from flax_tied_lora._ties.sources import (
    DATA_FLOW,
    SOURCES,
    Link,
    by_value,
    declared,
    from_config,
    is_table,
    same_arrays,
)
from flax_tied_lora._tree.foreign import refuse_models
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
    | Names
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
        ``tie_word_embeddings``, of transformers 4 or 5. False there unties embedding and output
        projection; so does False in ``scale_decoder_outputs``, where transformers 5 keeps what
        T5's configs were told, and what a release's PyTorch class does not tie. Or the model's
        `names.Names`: then leaves that are one tensor in PyTorch must have the same values.
      sites: call sites of the model, for ties by data flow.
      equal_values: whether to compare values. Arrays of one repeated value never count.

    Raises:
      ValueError: a declared leaf does not exist or its shape does not fit, or a config does not
        say which leaves it ties.
      TypeError: ``ties`` is none of the above.
    """
    refuse_models("find_ties", params, "; pass its state, nnx.state(module, nnx.Param)")
    return ties_among(flatten(params)[0], ties, sites=sites, equal_values=equal_values)


def all_groups(leaves: Iterable[str], ties: Sequence[TieGroup]) -> list[TieGroup]:
    """Returns the tie groups, and a group of one for every leaf that is in none."""
    tied = {path for group in ties for path in group.paths}
    return [*ties, *(TieGroup((Member(path),)) for path in leaves if path not in tied)]


def ties_among(
    leaves: Mapping[str, Any], ties: Any, *, sites: CallSites | None, equal_values: bool = False
) -> list[TieGroup]:
    """Returns the tie groups among leaves by path; see `find_ties`."""
    links = same_arrays(leaves)
    if isinstance(ties, str):
        if ties != "auto":
            raise TypeError(
                f"find_ties: ties={ties!r}; expected 'auto', a list, or a model's config"
            )
    elif isinstance(ties, Names):
        declared_by_names = from_names(leaves, ties)
        refuse_lost("find_ties", leaves, declared_by_names)
        links += declared_by_names
    elif isinstance(ties, Mapping) or any(hasattr(ties, name) for name in (TIED, "model_type")):
        links = from_config(leaves, ties, links)
    elif isinstance(ties, Sequence):
        links += [link for entry in ties for link in declared(leaves, entry)]
    else:
        raise TypeError(
            f"find_ties: ties is a {type(ties).__name__}; expected 'auto', a list of path pairs or "
            "TieGroups, a model's config with tie_word_embeddings, or its Names"
        )
    if equal_values:
        links += by_value(leaves)
    return _groups(leaves, links, sites or CallSites())


def _groups(leaves: Mapping[str, Any], links: Sequence[Link], sites: CallSites) -> list[TieGroup]:
    """Returns the groups that links join leaves to, and those of one leaf read at several sites."""
    neighbours: dict[str, list[Link]] = {}
    for link in links:
        neighbours.setdefault(link.first, []).append(link)
        neighbours.setdefault(link.second, []).append(link)
    reads: dict[str, list[CallSite]] = {}
    for site in sites:
        reads.setdefault(site.leaf, []).append(site)
    groups, seen = [], set()
    for path in leaves:
        if path in seen:
            continue
        flips, sources, queue = {path: False}, set(), [path]
        while queue:
            member = queue.pop()
            for link in neighbours.get(member, ()):
                other = link.second if link.first == member else link.first
                sources.add(link.source)
                flip = flips[member] ^ link.transposed
                if flips.setdefault(other, flip) != flip:
                    raise ValueError(
                        f"find_ties: {other!r} is tied to {path!r} both as it is and transposed; "
                        "check ties=..., or leave one of them out"
                    )
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        seen.add(path)
        if sum(len(reads.get(p, ())) for p in flips) > 1:
            sources.add(DATA_FLOW)
        if sources:
            groups.append(_group(leaves, flips, sources, reads))
    return groups


def _group(
    leaves: Mapping[str, Any], flips: Mapping[str, bool], sources: set[str],
    reads: Mapping[str, Sequence[CallSite]],
) -> TieGroup:  # fmt: skip
    """Returns a group, first the member that is stored: with values, looked up, called a table."""

    def rank(path: str) -> tuple[bool, bool, bool]:
        looked_up = any(s.role == LOOKUP for s in reads.get(path, ()))
        abstract = isinstance(array_of(leaves[path]), jax.ShapeDtypeStruct)
        return abstract, not looked_up, not is_table(path)

    order = sorted(flips, key=rank)
    stored = flips[order[0]]
    return TieGroup(
        tuple(Member(p, flips[p] != stored) for p in order),
        tuple(source for source in SOURCES if source in sources),
    )
