"""A plan's JSON, checked: each field by itself, and what fields say of one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION
from flax_tied_lora._config.json_fields import (
    COUNT,
    COUNTS,
    FLAG,
    LIST,
    OBJECT,
    TEXT,
    TEXTS,
    Kind,
    check_fields,
    check_value,
    one_of,
    optional,
)

# The collections that adapters are kept in, by their kind.
LORA = "lora"
MODULES_TO_SAVE = "modules_to_save"
TRAINABLE_TOKENS = "trainable_tokens"
BIAS = "bias"
COLLECTIONS = (LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS, BIAS)


def _is_role(pair: Any) -> bool:
    return TEXTS.fits(pair) and len(pair) == 2 and pair[1] in (LOOKUP, PROJECTION)


_SPAN = Kind("an axis, a start and a stop", lambda x: COUNTS.fits(x) and len(x) == 3)
_PLAN = {"format": COUNT, "groups": LIST, "config": OBJECT}
_TIE = {"members": LIST, "found": TEXTS}
_GROUP = _TIE | {
    "shape": COUNTS,
    "dtype": TEXT,
    "rows": COUNTS,
    "cols": COUNTS,
    "batch": COUNTS,
    "is_table": FLAG,
    "adapters": LIST,
    "roles": Kind("pairs of a leaf and its role", lambda x: LIST.fits(x) and all(map(_is_role, x))),
}
_MEMBER = {"path": TEXT, "transposed": FLAG}
_ADAPTER = {
    "kind": one_of(*COLLECTIONS),
    "key": TEXT,
    "name": TEXT,
    "members": TEXTS,
    "sites": optional(OBJECT),
    "rank": COUNT,
    "dora": FLAG,
    "residual": FLAG,
    "tokens": COUNTS,
    "module": TEXT,
    "targets": TEXTS,
    "span": optional(_SPAN),
}
_SITES = {
    "role": one_of(None, LOOKUP, PROJECTION, OTHER),
    "scope": optional(TEXT),
    "others": LIST,
}


def check_plan(content: Any) -> None:
    """Checks a plan's JSON; its config checks itself.

    Raises:
      KeyError: a field is missing.
      ValueError: a field is unknown, of another kind, or does not fit the others.
    """
    check_fields(content, "plan", _PLAN)
    for i, group in enumerate(content["groups"]):
        where = f"groups[{i}]"
        check_fields(group, where, _GROUP, may_lack=("roles",))
        _check_group(group, where)
    groups = content["groups"]
    _check_once((m["path"] for g in groups for m in g["members"]), "the leaf")
    adapters = [a for g in groups for a in g["adapters"]]
    _check_once((f"{a['kind']} {a['key']}" for a in adapters), "the adapter")


def check_ties(ties: Any) -> None:
    """Checks the JSON of tie groups; raises as `check_plan`."""
    check_value(ties, "ties", LIST)
    for i, tie in enumerate(ties):
        check_fields(tie, f"ties[{i}]", _TIE)
        _check_members(tie, f"ties[{i}]")
    _check_once((m["path"] for tie in ties for m in tie["members"]), "the leaf")


def _check_members(group: Mapping[str, Any], where: str) -> None:
    for i, member in enumerate(group["members"]):
        check_fields(member, f"{where}.members[{i}]", _MEMBER)
    if not group["members"] or group["members"][0]["transposed"]:
        raise ValueError(f"{where}.members: expected a leaf first that is not transposed")


def _check_group(group: Mapping[str, Any], where: str) -> None:
    _check_members(group, where)
    shape, sides = group["shape"], [group[side] for side in ("rows", "cols", "batch")]
    axes = [axis for side in sides for axis in side]
    if len(set(axes)) < len(axes) or any(axis >= len(shape) for axis in axes):
        raise ValueError(f"{where}: rows, cols and batch are {sides}; expected axes of {shape}")
    if len(shape) != 2 and any(m["transposed"] for m in group["members"]):
        raise ValueError(f"{where}: a member of shape {shape} is transposed; expected a matrix")
    for i, adapter in enumerate(group["adapters"]):
        name = f"{where}.adapters[{i}]"
        check_fields(adapter, name, _ADAPTER, may_lack=("span",))
        _check_adapter(adapter, name, group)


def _check_adapter(adapter: Mapping[str, Any], where: str, group: Mapping[str, Any]) -> None:
    paths = {m["path"] for m in group["members"]}
    if not paths.issuperset(adapter["members"]):
        raise ValueError(f"{where}.members: expected leaves of {sorted(paths)}")
    if adapter["sites"] is not None:
        _check_sites(adapter["sites"], f"{where}.sites")
        for i, other in enumerate(adapter["sites"]["others"]):
            _check_sites(other, f"{where}.sites.others[{i}]")
            check_value(other["others"], f"{where}.sites.others[{i}].others", _EMPTY)
    if adapter["kind"] == LORA and not (adapter["rank"] and group["rows"] and group["cols"]):
        raise ValueError(f"{where}: factors of rank {adapter['rank']}; expected a rank, rows, cols")
    if adapter["kind"] == TRAINABLE_TOKENS:
        _check_tokens(adapter["tokens"], f"{where}.tokens", group)
    if adapter.get("span") is not None:
        axis, start, stop = adapter["span"]
        shape = group["shape"]
        if axis >= len(shape) or not start < stop <= shape[axis]:
            raise ValueError(f"{where}.span is {adapter['span']}; expected a part of {shape}")


_EMPTY = Kind("an empty list", lambda value: value == [])


def _check_sites(sites: Any, where: str) -> None:
    check_fields(sites, where, _SITES)


def _check_tokens(tokens: list[int], where: str, group: Mapping[str, Any]) -> None:
    axes = group["rows"] if group["is_table"] else group["cols"]
    most = group["shape"][axes[0]] if axes else 0
    if not tokens or len(set(tokens)) < len(tokens) or max(tokens) >= most:
        raise ValueError(
            f"{where} is {repr(tokens)[:80]}; expected different ones, each below {most}"
        )


def _check_once(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name[:80]!r} is there twice; expected it once")
        seen.add(name)
