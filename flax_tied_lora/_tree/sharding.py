"""Where arrays are: shardings that are part of a type, manual mesh axes, and shards of an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax import lax


def explicit(aval: Any) -> jax.NamedSharding | None:
    """Returns the sharding that is part of an array's type (`jax.typeof`): on Explicit axes."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def split(array: Any) -> jax.NamedSharding | None:
    """Returns the sharding that is part of an array's type, where it splits one of its axes."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    return sharding if sharding is not None and any(sharding.spec) else None


def single(array: Any) -> bool:
    """Returns whether an array is one shard, as far as its type says.

    On Auto axes a type says the mesh, and not what is split.
    """
    return automatic_shard_count(array) == 1 and split(array) is None


def share_names(*arrays: Any) -> bool:
    """Returns whether a mesh axis splits more than one of some arrays, as part of their types."""
    specs = [() if (sharding := split(x)) is None else sharding.spec for x in arrays]
    names = [
        {n for s in spec for n in (s if isinstance(s, tuple) else (s,)) if n} for spec in specs
    ]
    return sum(map(len, names)) > len(set().union(*names))


def replicated(array: Any) -> Any:
    """Returns an array replicated over Explicit axes, for what needs it whole or joins several."""
    sharding = split(array)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, jax.NamedSharding(sharding.mesh, jax.P()))


def placed_as(array: Any, other: Any) -> Any:
    """Returns an array with another's sharding, on Explicit axes: what it is multiplied into."""
    sharding = explicit(jax.typeof(other))
    return replicated(array) if sharding is None else jax.sharding.reshard(array, sharding)


def automatic(function: Any, out_sharding: Any) -> Any:
    """Returns a function within which the compiler places arrays, as on Auto mesh axes.

    For operations that split and join axes, which have no rule for Explicit ones.
    """
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)


def shard_count(mesh: Any, names: Any) -> int:
    """Returns how many shards an axis has, whose entry in a spec is a name, several or None."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[n] for n in names if isinstance(n, str))


def automatic_shard_count(array: Any) -> int:
    """Returns into how many shards the compiler may split an array: the devices of Auto axes."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    if sharding is None:
        return 1
    kinds = zip(sharding.mesh.shape.values(), sharding.mesh.axis_types, strict=True)
    return math.prod(n for n, kind in kinds if kind == jax.sharding.AxisType.Auto)


def varying(array: Any) -> frozenset[str]:
    """Returns the manual mesh axes that an array varies over, inside a `jax.shard_map`."""
    return frozenset(getattr(getattr(jax.typeof(array), "manual_axis_type", None), "varying", ()))


def vary(array: Any, axes: Iterable[str]) -> Any:
    """Returns an array that varies over manual mesh axes, besides those that it varies over now."""
    lacking = frozenset(axes) - varying(array)
    return lax.pcast(array, tuple(sorted(lacking)), to="varying") if lacking else array
