"""`trainable_token_indices`: which tables have rows replaced, and which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.matches import Hit, Hits, adaptable
from flax_tied_lora._planning.targets import named_groups
from flax_tied_lora._planning.tying import Share, check_overlap, is_tied, shares_of
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import EMBEDDINGS, is_table
from flax_tied_lora._tree.paths import leaf_name, matches, module_of

_FIELD = "trainable_token_indices"

# For the key of each group: its shares, each with the rows that are replaced in it.
TokenShares = dict[str, list[tuple[Share, tuple[int, ...]]]]


def token_shares(
    config: LoraConfig, leaves: Mapping[str, Any], groups: Sequence[TieGroup],
    sites: CallSites | None,
) -> TokenShares:  # fmt: skip
    """Returns which rows of which groups are replaced.

    A list is for the input embedding, and all that is tied to it. Names in a dict are those of
    modules, scopes or roles; several of one tie group are one share if their rows are the same.
    Follows ``peft.utils.other.set_additional_trainable_modules``.

    Raises:
      ValueError: a name means no table, or it is not clear which table is the input embedding;
        names of one group have different rows and `ensure_weight_tying` is not False.
    """
    wanted: Any = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        group = _input_embedding(leaves, groups, sites)
        hit = Hit(_FIELD, module_of(group.key) or group.key, leaf=group.key)
        return {group.key: [(Share((hit,)), tuple(wanted))]}
    by_key = {g.key: g for g in groups}
    named: dict[str, dict[str, tuple[Hit, ...]]] = {}
    for name in wanted:
        hits = named_groups(_FIELD, name, leaves, groups, sites)
        tables = [key for key in hits if adaptable(leaves[key])]
        if len(tables) != 1:
            raise ValueError(
                f"wrap: {name!r} in {_FIELD} means "
                f"{', '.join(map(repr, tables)) or 'no matrix'}; expected one table"
            )
        for key in tables:
            named.setdefault(key, {})[name] = hits[key]
    rows = {name: tuple(ids) for name, ids in wanted.items()}
    return {
        key: _shares_with_rows(by_key[key], hits, rows, config, sites)
        for key, hits in named.items()
    }


def _shares_with_rows(
    group: TieGroup, named: Mapping[str, tuple[Hit, ...]], rows: Mapping[str, tuple[int, ...]],
    config: LoraConfig, sites: CallSites | None,
) -> list[tuple[Share, tuple[int, ...]]]:  # fmt: skip
    """Returns the shares of a group that have rows replaced.

    Args:
      named: the hits of each name that means the group.
      rows: which rows a name wants replaced.
    """
    hits = tuple(hit for of_name in named.values() for hit in of_name)
    first = rows[next(iter(named))]
    same = all(set(rows[name]) == set(first) for name in named)
    embedding = any(_is_lookup(hit, group, sites) for hit in hits)
    if same and (embedding or config.ensure_weight_tying is not False):
        return [(Share(hits), first)]
    if config.ensure_weight_tying is not False:
        differ = ", ".join(f"{name!r}: {list(rows[name])}" for name in named)
        raise ValueError(
            f"wrap: {_FIELD} gives different rows to names of {group.key!r}, which is one tie "
            f"group: {differ}. Give them the same, or set ensure_weight_tying=False to treat them "
            "as separate"
        )
    shares = [
        (share, rows[share.hits[0].target]) for share in shares_of(group, hits, config, sites)
    ]
    check_overlap(_FIELD, group, [share for share, _ in shares], sites)
    return shares


def _is_lookup(hit: Hit, group: TieGroup, sites: CallSites | None) -> bool:
    """Returns whether a name means a table that rows are picked from, and not an output layer."""
    if not hit.leaf:
        return hit.role == LOOKUP
    roles = {s.role for s in (sites or CallSites()).of(hit.leaf)}
    return LOOKUP in roles if roles else is_table(hit.leaf)


def tokens_of(
    config: LoraConfig, hits: Hits, groups: Sequence[TieGroup], sites: CallSites | None
) -> TokenShares:
    """Returns which rows are replaced, where a file says which leaves have such rows."""
    wanted: Any = config.trainable_token_indices
    if not isinstance(wanted, Mapping):
        return {
            key: [(Share(hits_of_group), tuple(wanted or ()))]
            for key, hits_of_group in hits.items()
        }
    by_key, shares = {g.key: g for g in groups}, {}
    for key, hits_of_group in hits.items():
        names = {
            h: next((n for n in wanted if matches((n,), h.target)), None) for h in hits_of_group
        }
        # PEFT ties modules that the config does not name to one that it does: BART's encoder and
        # decoder to "shared". What is named comes first, and gives its share the name.
        hits_of_group = tuple(sorted(hits_of_group, key=lambda h: names[h] is None))
        lookup = {h: _is_lookup(h, by_key[key], sites) for h in hits_of_group}
        rows: dict[str, tuple[int, ...]] = {}
        for hit in hits_of_group:
            alike = (
                names[h] for h in hits_of_group if lookup[h] == lookup[hit] and names[h] is not None
            )
            name = names[hit] or next(alike, None)
            if name is None:
                raise ValueError(
                    f"{_FIELD} has no rows for {hit.target!r}, found {', '.join(map(repr, wanted))}"
                )
            rows[hit.target] = tuple(wanted[name])
        named = {hit.target: (hit,) for hit in hits_of_group}
        shares[key] = _shares_with_rows(by_key[key], named, rows, config, sites)
    return shares


def _input_embedding(
    leaves: Mapping[str, Any], groups: Sequence[TieGroup], sites: CallSites | None
) -> TieGroup:
    tables = input_embeddings(leaves, groups, sites)
    if len(tables) == 1:
        return tables[0]
    candidates = ", ".join(repr(g.key) for g in tables) or "no table"
    raise ValueError(
        f"wrap: {_FIELD} is a list, and the input embedding could be {candidates}; name it: "
        f'{_FIELD}={{"embed_tokens": [...]}}'
    )


def input_embeddings(
    leaves: Mapping[str, Any], groups: Sequence[TieGroup], sites: CallSites | None
) -> list[TieGroup]:
    """Returns the groups that could be the input embedding: by their call sites, or by name."""

    def looked_up(group: TieGroup) -> bool:
        if sites is None:
            return any(is_table(p) for p in group.paths)
        return any(s.role == LOOKUP for s in sites.of(*group.paths))

    tables = [g for g in groups if looked_up(g) and adaptable(leaves[g.key])]
    named = [g for g in tables if any(leaf_name(module_of(p)) in EMBEDDINGS for p in g.paths)]
    tied = [g for g in tables if is_tied(g, sites)]
    return next((choice for choice in (named, tied) if len(choice) == 1), tables)
