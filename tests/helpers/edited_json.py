"""JSON as somebody may have edited it: one value replaced, removed, added or renamed."""

from __future__ import annotations

import copy
import random
from typing import Any

JUNK = (
    None, True, False, 0, 1, -1, 3, -(2**40), 2**31, 2**62, 2**64, 10**30, 0.5, 2.0, 1e300, "", "x",
    "../x", "a/../../b", "/etc/passwd", "\0", "float32", "lora", "embed/embedding", "é" * 5000,
    [], [0], [-1], [0, 0], [1.5], ["x"], [[]], [None], list(range(3000)), [10**12], [2**40, 2**40],
    {}, {"x": 1}, {"path": "x"}, {"..": {}},
)  # fmt: skip


def containers(value: Any) -> list[Any]:
    """Returns all objects and lists within a value that have something in them."""
    found = []
    if isinstance(value, dict | list) and value:
        found.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            found += containers(inner)
    return found


def edited(rng: random.Random, value: Any) -> Any:
    """Returns a copy of a value with one edit."""
    value = copy.deepcopy(value)
    place = rng.choice(containers(value))
    key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    kind = rng.choice(["replace", "replace", "near", "remove", "add", "rename", "grow", "nest"])
    if kind == "replace":
        place[key] = copy.deepcopy(rng.choice(JUNK))
    elif kind == "near":
        place[key] = near(rng, place[key])
    elif kind == "remove":
        del place[key]
    elif kind in ("add", "rename") and isinstance(place, dict):
        moved = place.pop(key) if kind == "rename" else copy.deepcopy(rng.choice(JUNK))
        place[rng.choice(["x", "", "..", "../x", "adapted/../extra", key + "x"])] = moved
    elif kind == "grow" and isinstance(place, list):
        place *= rng.choice([2, 1000])
    else:
        inner = place[key]
        for _ in range(rng.choice([1, 3, 200])):
            inner = [inner]
        place[key] = inner
    return value


def near(rng: random.Random, value: Any) -> Any:
    """Returns a value that is much like another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, float(value), str(value), value * 1000])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), f"../{value}", [value]])
    if isinstance(value, list):
        return rng.choice([value[::-1], value * 2, value[1:], [*value, None], tuple(value)])
    return rng.choice([{}, [value], None, list(value or ())])
