"""Tie groups: one stored array, and every leaf that is that array."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Member:
    """A leaf of a tie group.

    Attributes:
      path: of the leaf.
      transposed: whether the leaf is the transpose of the group's canonical leaf.
    """

    path: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class TieGroup:
    """One stored array, and every leaf that is that array.

    Attributes:
      members: the leaves; the first one is canonical, and is stored.
      found: how the tie is known: "same array", "declared", "model config", "equal values",
        "data flow" (one leaf, read at several call sites).
    """

    members: tuple[Member, ...]
    found: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Path of the canonical leaf."""
        return self.members[0].path

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all members."""
        return tuple(m.path for m in self.members)

    def __str__(self) -> str:
        names = [m.path + (" (transposed)" if m.transposed else "") for m in self.members]
        return f"{' = '.join(names)} [{', '.join(self.found)}]"
