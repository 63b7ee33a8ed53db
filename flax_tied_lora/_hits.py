"""How a target names a tie group, and what can be targeted at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._config import LoraConfig
from flax_tied_lora._paths import matches
from flax_tied_lora._sites import Role


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


def excluded(config: LoraConfig, *names: str) -> bool:
    """Returns whether `exclude_modules` names one of these."""
    return config.exclude_modules is not None and any(
        matches(config.exclude_modules, name) is not None for name in names
    )
