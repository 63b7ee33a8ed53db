"""A record's JSON, checked: each field of each kind of checkpoint."""

from __future__ import annotations

from typing import Any

from flax_tied_lora._config.json_fields import (
    COUNT,
    COUNTS,
    LIST,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    check_value,
    one_of,
    optional,
)
from flax_tied_lora._planning.plan_checks import check_ties

_COMMON = {"format": COUNT, "items": OBJECT}
_OF_ADAPTERS = _COMMON | {"step": COUNT, "plan": OBJECT, "base": OBJECT}
_OF_PARAMS = _COMMON | {"ties": LIST, "quantized": OBJECT}
# By what tells the kinds of records apart, the items that there may be.
ITEMS = {"plan": ("adapted", "opt_state", "extra"), "ties": ("params",)}
_LEAF = {
    "shape": COUNTS,
    "dtype": TEXT,
    "kind": one_of("jax", "numpy", "bool", "int", "float"),
    "checksum": COUNT,
    "impl": TEXT,
}


def _is_base_leaf(value: Any) -> bool:
    fields = (COUNTS, TEXT, optional(COUNT))
    return isinstance(value, list) and len(value) == 3 and _fit(value, fields)


def _is_quantized(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _fit(value, (TEXT, COUNT))


def _fit(value: list[Any], kinds: tuple[Kind, ...]) -> bool:
    return all(kind.fits(x) for x, kind in zip(value, kinds, strict=True))


_BASE_LEAF = Kind("a shape, a dtype and a checksum or null", _is_base_leaf)
_QUANTIZED = Kind("a type of quantised values and an axis", _is_quantized)


def check_record(record: Any) -> None:
    """Checks a record but for its plan, which `Plan.from_json` checks.

    Raises:
      KeyError: a field is missing.
      ValueError: a field is unknown, or of another kind.
    """
    if "ties" in record:
        check_fields(record, "record", _OF_PARAMS, may_lack=("quantized",))
        check_fields(record["items"], "items", dict.fromkeys(ITEMS["ties"], OBJECT))
        check_ties(record["ties"])
        for path, entry in record.get("quantized", {}).items():
            check_value(entry, f"quantized.{path[:80]}", _QUANTIZED)
    else:
        check_fields(record, "record", _OF_ADAPTERS)
        required, *others = ITEMS["plan"]
        check_fields(
            record["items"], "items", dict.fromkeys((required, *others), OBJECT), may_lack=others
        )
        for path, entry in record["base"].items():
            check_value(entry, f"base.{path[:80]}", _BASE_LEAF)
    for item, listing in record["items"].items():
        for name, entry in listing.items():
            check_fields(entry, f"{item}.{name[:80]}", _LEAF, may_lack=("impl",))
