"""The plan: what was adapted, as static data. Hashable, interned, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from flax_tied_lora._algebra.factor import RANK
from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION, SiteFilter
from flax_tied_lora._config.as_dict import from_dict
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import LeafInfo
from flax_tied_lora._planning import plan_checks
from flax_tied_lora._planning.plan_checks import BIAS, LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._ties.sources import is_table

FORMAT = 1

# The name of DoRA's array beside the factors.
MAGNITUDE = "lora_magnitude"

# A part of a fused leaf: the axis that it is cut along, its start and its stop.
Span = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """One adapter of a tie group: of all that the group is, or of some of its call sites.

    Attributes:
      kind: the collection that it is kept in: ``"lora"`` (factors), ``"modules_to_save"`` (a
        trainable copy), ``"trainable_tokens"`` (rows that replace rows) or ``"bias"`` (a trainable
        bias).
      key: its key there: the group's, and for a share of it ``"<group key>:<name>"``.
      name: what the user called the share of the group that it is for; "" for the whole group.
      members: leaves of the group that it is for; () for all.
      sites: call sites that it is for; None for all.
      rank: of the factors.
      dora: whether the factors come with a magnitude (DoRA).
      residual: whether the factors' first values were taken out of the frozen weight (PiSSA).
      tokens: the rows that are replaced.
      module: by whose name rank and alpha were looked up in the config's patterns.
      targets: the targets that named it, as the user wrote them.
      span: of a part of a fused leaf, the axis that it is cut along, its start and its stop.
    """

    kind: str
    key: str
    name: str = ""
    members: tuple[str, ...] = ()
    sites: SiteFilter | None = None
    rank: int = 0
    dora: bool = False
    residual: bool = False
    tokens: tuple[int, ...] = ()
    module: str = ""
    targets: tuple[str, ...] = ()
    span: Span | None = None

    @property
    def separate(self) -> bool:
        """Whether it is for some leaves or call sites of its group only."""
        return bool(self.members) or self.sites is not None

    def named(self, module: str) -> str:
        """What the user calls it by a module's or leaf's name: of a part with ``:<part>``."""
        return f"{module}:{self.name}" if self.span else module

    def covers(self, path: str) -> bool:
        """Whether it is for reads of a member of its group."""
        return not self.members or path in self.members

    def __str__(self) -> str:
        if self.kind == LORA:
            what = f"{'DoRA' if self.dora else 'LoRA'}, rank {self.rank}"
        elif self.kind == TRAINABLE_TOKENS:
            what = f"{len(self.tokens)} row" + "s" * (len(self.tokens) > 1)
        else:
            what = {MODULES_TO_SAVE: "full copy", BIAS: "bias"}[self.kind]
        return f"{what} ({self.name} only)" if self.name else what


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One stored array: the leaves that it is, and the adapters that it has.

    Attributes:
      members: its leaves; the first one is canonical, and gives the group's key and layout.
      found: how the tie is known; () for a leaf of its own.
      shape, dtype: of the canonical leaf.
      rows, cols, batch: axes of the canonical leaf, where they are needed. ``lora_a`` is
        [batch..., rows..., rank], ``lora_b`` is [batch..., rank, cols...], ``lora_magnitude`` is
        [batch..., cols...].
      is_table: whether rows are picked from it by index.
      adapters: its adapters; () where the group is tied and not adapted.
      roles: (leaf, role) pairs: what call sites say that its leaves are, where they say it.
    """

    members: tuple[Member, ...]
    found: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    is_table: bool = False
    adapters: tuple[AdapterPlan, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Path of the canonical leaf."""
        return self.members[0].path

    @property
    def token_axis(self) -> int:
        """The axis along which tokens are: rows of a table, columns of an output projection."""
        return self.rows[0] if self.is_table else self.cols[0]

    @property
    def separate(self) -> tuple[AdapterPlan, ...]:
        """The adapters that are for some of its leaves or call sites only."""
        return tuple(a for a in self.adapters if a.separate)

    def is_head(self, adapter: AdapterPlan) -> bool:
        """Whether an adapter is for a table's projections only."""
        if adapter.sites is not None:
            others = adapter.sites.others
            left = bool(others) and all(other.role == LOOKUP for other in others)
            return left or adapter.sites.role == PROJECTION
        roles = {m.path: LOOKUP if is_table(m.path) else PROJECTION for m in self.members}
        roles |= {m.path: PROJECTION for m in self.members if m.transposed} | dict(self.roles)
        return {roles[path] for path in adapter.members} == {PROJECTION}

    def axes(self, adapter: AdapterPlan) -> dict[str, tuple[Any, ...]]:
        """For each array of an adapter, the leaf axis that each of its axes is, or `RANK`.

        Factors have names; the only array of another kind is called "". The rows of
        ``trainable_tokens`` are its first axis, labelled `RANK`.
        """
        if adapter.kind == TRAINABLE_TOKENS:
            others = (i for i in range(len(self.shape)) if i != self.token_axis)
            return {"": (RANK, *others)}
        if adapter.kind != LORA:
            return {"": tuple(range(len(self.shape)))}
        axes = {
            "lora_a": (*self.batch, *self.rows, RANK),
            "lora_b": (*self.batch, RANK, *self.cols),
        }
        return axes | {MAGNITUDE: (*self.batch, *self.cols)} if adapter.dora else axes

    def shape_of(self, adapter: AdapterPlan) -> tuple[int, ...]:
        """Shape of what an adapter is for: the leaf, or a part of a fused one."""
        if adapter.span is None:
            return self.shape
        axis, start, stop = adapter.span
        return (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])

    def rank_limit(self, adapter: AdapterPlan) -> int:
        """The largest rank that what an adapter is for can have."""
        shape = self.shape_of(adapter)
        return min(math.prod(shape[a] for a in side) for side in (self.rows, self.cols))

    def shapes(self, adapter: AdapterPlan) -> dict[str, tuple[int, ...]]:
        """For each array of an adapter, its shape."""
        size = len(adapter.tokens) if adapter.kind == TRAINABLE_TOKENS else adapter.rank
        shape = self.shape_of(adapter)
        return {
            name: tuple(size if a == RANK else shape[a] for a in axes)
            for name, axes in self.axes(adapter).items()
        }

    def size(self, adapter: AdapterPlan) -> int:
        """Number of trainable parameters of an adapter."""
        return sum(math.prod(shape) for shape in self.shapes(adapter).values())

    def info(self, member: Member) -> LeafInfo:
        """Returns what the evaluator has to know of a member, in the member's own layout."""

        def of_member(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(1 - a for a in axes)) if member.transposed else axes

        return LeafInfo(of_member(self.rows), of_member(self.batch), self.is_table)

    def tie(self) -> TieGroup:
        """The group without its adapters."""
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
        content = _Content((hash((groups, config)), groups, config))
        with _LOCK:
            plan = _PLANS.get(content) or cls(groups, config, content[0])
            return _PLANS.setdefault(content, plan)

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
        """The groups that have adapters."""
        return tuple(g for g in self.groups if g.adapters)

    def adapters(self, kind: str | None = None) -> Iterator[tuple[GroupPlan, AdapterPlan]]:
        """Yields every adapter, or those of a kind, with its group."""
        for group in self.groups:
            for adapter in group.adapters:
                if kind in (None, adapter.kind):
                    yield group, adapter

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
            plan_checks.check_plan(content)
            groups = tuple(_group(entry) for entry in content["groups"])
            config = from_dict(content["config"])  # nothing is matched again: any pattern is taken
            return cls.of(groups, LoraConfig(**config))
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"not the JSON of a plan: {error!r}") from error


class _Content(tuple[int, tuple[GroupPlan, ...], LoraConfig]):
    """What a plan is interned by: a hash, which is computed once, and what it is of."""

    def __hash__(self) -> int:
        return self[0]


_PLANS: weakref.WeakValueDictionary[_Content, Plan] = weakref.WeakValueDictionary()
_LOCK = threading.RLock()  # the collector may run any code while one is looked up


def _group(entry: Mapping[str, Any]) -> GroupPlan:
    tuples = {name: tuple(entry[name]) for name in ("found", "shape", "rows", "cols", "batch")}
    members = tuple(Member(**m) for m in entry["members"])
    adapters = tuple(_adapter(a) for a in entry["adapters"])
    tuples["roles"] = tuple(map(tuple, entry.get("roles", ())))
    return GroupPlan(**{**entry, **tuples, "members": members, "adapters": adapters})


def _adapter(entry: Mapping[str, Any]) -> AdapterPlan:
    tuples = {name: tuple(entry[name]) for name in ("members", "tokens", "targets")}
    span = None if entry.get("span") is None else tuple(entry["span"])
    return AdapterPlan(**{**entry, **tuples, "sites": _sites(entry["sites"]), "span": span})


def _sites(entry: Any) -> SiteFilter | None:
    if entry is None:
        return None
    others = tuple(_sites(other) for other in entry["others"])
    return SiteFilter(entry["role"], entry["scope"], others)  # type: ignore[arg-type]
