"""The plan: what was adapted, as static data. Hashable, interned, JSON."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Mapping
from typing import Any

from flax_tied_lora._config import LoraConfig
from flax_tied_lora._evaluate import LeafInfo
from flax_tied_lora._factor import RANK
from flax_tied_lora._ties import Member, TieGroup

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One stored array: the leaves that it is, and the factors that it has.

    Attributes:
      members: its leaves; the first one is canonical, and gives the group's key and layout.
      found: how the tie is known; () for a leaf of its own.
      shape, dtype: of the canonical leaf.
      rank: of the factors; 0 where the group is tied and not adapted.
      rows, cols, batch: axes of the canonical leaf. ``lora_a`` is [batch..., rows..., rank],
        ``lora_b`` is [batch..., rank, cols...].
      is_table: whether rows are picked from it by index.
      targets: the targets that named it, as the user wrote them.
    """

    members: tuple[Member, ...]
    found: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rank: int = 0
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    is_table: bool = False
    targets: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Path of the canonical leaf."""
        return self.members[0].path

    @property
    def factor_axes(self) -> dict[str, tuple[Any, ...]]:
        """For each factor, the leaf axis that each of its axes is, or `RANK`."""
        return {
            "lora_a": (*self.batch, *self.rows, RANK),
            "lora_b": (*self.batch, RANK, *self.cols),
        }

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """For each factor, its shape."""
        return {
            name: tuple(self.rank if a == RANK else self.shape[a] for a in axes)
            for name, axes in self.factor_axes.items()
        }

    def info(self, member: Member) -> LeafInfo:
        """What the evaluator has to know of a member, in the member's own layout."""

        def own(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(1 - a for a in axes)) if member.transposed else axes

        return LeafInfo(own(self.rows), own(self.cols), own(self.batch), self.is_table)

    def tie(self) -> TieGroup:
        """The group without its factors."""
        return TieGroup(self.members, self.found)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The static description of what was adapted: groups and config.

    Equal plans are one object (`Plan.of`), so that comparing two costs nothing when a compiled
    function is called.
    """

    groups: tuple[GroupPlan, ...]
    config: LoraConfig
    _hash: int

    @classmethod
    def of(cls, groups: tuple[GroupPlan, ...], config: LoraConfig) -> Plan:
        """Returns the plan with these groups and config."""
        key = (groups, config)
        number = hash(key)
        for plan in _PLANS.get(number, ()):
            if (plan.groups, plan.config) == key:
                return plan
        plan = cls(groups, config, number)
        _PLANS.setdefault(number, weakref.WeakSet()).add(plan)
        return plan

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other

    def __reduce__(self) -> Any:
        return Plan.of, (self.groups, self.config)

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __repr__(self) -> str:
        return f"Plan({len(self.groups)} groups, {self.config!r})"

    @property
    def adapted(self) -> tuple[GroupPlan, ...]:
        """The groups that have factors."""
        return tuple(g for g in self.groups if g.rank)

    def to_json(self) -> str:
        """Returns the plan as JSON text; `from_json` reads it back."""
        groups = [dataclasses.asdict(g) for g in self.groups]
        content = {"format": FORMAT, "groups": groups, "config": self.config.to_dict()}
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Returns the plan that `to_json` wrote.

        Raises:
          ValueError: the text is not that, or of another format.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}; expected {FORMAT}")
            groups = tuple(_group(entry) for entry in content["groups"])
            return cls.of(groups, LoraConfig.from_dict(content["config"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not the JSON of a plan: {error!r}") from error


_PLANS: dict[int, weakref.WeakSet[Plan]] = {}


def _group(entry: Mapping[str, Any]) -> GroupPlan:
    tuples = {
        name: tuple(entry[name]) for name in ("found", "shape", "rows", "cols", "batch", "targets")
    }
    members = tuple(Member(**m) for m in entry["members"])
    return GroupPlan(**{**entry, **tuples, "members": members})
