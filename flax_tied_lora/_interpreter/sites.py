"""Call sites: which leaf is read where, by what operation, and in what role."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION, Role
from flax_tied_lora._tree.table import table


@dataclasses.dataclass(frozen=True)
class CallSite:
    """One operation of a traced model that reads a leaf.

    Attributes:
      leaf: path of the leaf.
      operation: name of the JAX primitive.
      ordinal: how many sites of the same leaf and operation came before it.
      scope: module path on the trace's name stack, without the marks of transformations; "" where
        the trace has none.
      role: what the site does with the leaf: ``"lookup"`` (rows picked), ``"projection"``
        (multiplied), ``"other"``.
      rows: leaf axes that are picked from or summed over.
      cols: leaf axes that remain in the result.
      batch: leaf axes that are walked in step with the data (stacked layers, experts).
    """

    leaf: str
    operation: str
    ordinal: int = 0
    scope: str = ""
    role: Role = OTHER
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" in {self.scope}" if self.scope else ""
        return f"{self.operation} #{self.ordinal} of {self.leaf!r}{where} ({self.role})"


@dataclasses.dataclass(frozen=True)
class Read:
    """A call site as it was met in an evaluation, and how it was served.

    Attributes:
      site: the call site.
      served: ``"low rank"``, ``"rows"`` (some rows are replaced), ``"copy"`` (a trainable copy of
        the whole), ``"dense"`` (the weight was materialised), ``"plain"`` (as it was),
        ``"quantised"`` (as it is stored), or ``"dequantised"`` (into one array).
      groups: keys of the adapters that were applied.
      flops, bytes: what it cost beyond the unadapted operation, as `explain` counts it. Of an
        operation that reads several leaves at once all is at the first, so that sums are right.
      undropped: whether dropout is on, and the weight was materialised, so that it has none here.
    """

    site: CallSite
    served: str
    groups: tuple[str, ...] = ()
    flops: int = 0
    bytes: int = 0
    undropped: bool = False


# How a site is served where an array of the weight's size is made for it.
DENSE, DEQUANTISED = "dense", "dequantised"


@dataclasses.dataclass(frozen=True)
class CallSites:
    """The call sites of one or several traces. Hashable; ``sites1 | sites2`` unites.

    Attributes:
      sites: in the order in which the traces met them.
    """

    sites: tuple[CallSite, ...] = ()

    def __iter__(self) -> Iterator[CallSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __or__(self, other: CallSites) -> CallSites:
        return CallSites(tuple(dict.fromkeys(self.sites + other.sites)))

    def of(self, *leaves: str) -> tuple[CallSite, ...]:
        """Returns the sites that read one of the leaves."""
        found = sorted(i for leaf in set(leaves) for i in self._positions.get(leaf, ()))
        return tuple(self.sites[i] for i in found)

    @functools.cached_property
    def _positions(self) -> dict[str, list[int]]:
        """Where the sites of each leaf are: a plan asks for those of each of its groups."""
        positions: dict[str, list[int]] = {}
        for i, site in enumerate(self.sites):
            positions.setdefault(site.leaf, []).append(i)
        return positions

    def leaves(self) -> tuple[str, ...]:
        """Returns the paths of the leaves that are read, in the order of their first site."""
        return tuple(dict.fromkeys(s.leaf for s in self.sites))

    def to_json(self) -> str:
        """Returns the sites as JSON text; `from_json` reads it back."""
        return json.dumps([dataclasses.asdict(s) for s in self.sites])

    @classmethod
    def from_json(cls, text: str) -> CallSites:
        """Returns the sites that `to_json` wrote.

        Raises:
          ValueError: the text is not that.
        """
        try:
            return cls(tuple(_site(entry) for entry in json.loads(text)))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of call sites: {error}") from error

    def __str__(self) -> str:
        header = ("leaf", "operation", "role", "rows", "cols", "batch", "scope")
        rows = [
            (s.leaf, f"{s.operation} #{s.ordinal}", s.role, s.rows, s.cols, s.batch, s.scope)
            for s in self.sites
        ]
        return table(header, rows)


def _site(entry: Mapping[str, Any]) -> CallSite:
    axes = {name: tuple(int(a) for a in entry[name]) for name in ("rows", "cols", "batch")}
    if entry["role"] not in (LOOKUP, PROJECTION, OTHER):
        raise ValueError(f"not the JSON of call sites: unknown role {entry['role']!r}")
    return CallSite(**{**entry, **axes})


def numbered(reads: Iterable[Read]) -> tuple[Read, ...]:
    """Returns the reads with their sites' ordinals counted, in the order given."""
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for read in reads:
        key = read.site.leaf, read.site.operation
        if read.site.ordinal != seen[key]:
            read = dataclasses.replace(read, site=dataclasses.replace(read.site, ordinal=seen[key]))
        result.append(read)
        seen[key] += 1
    return tuple(result)


def with_batch(reads: Iterable[Read], ndims: Mapping[str, int]) -> tuple[Read, ...]:
    """Returns the reads with their sites' batch axes complete.

    What a leaf is multiplied or looked up along is rows and columns; the axes left over were
    walked before that, by a scan or an index. Where entries are picked one by one, no axis is
    kept, and nothing is said of any.
    """
    result = []
    for read in reads:
        site = read.site
        if site.role == LOOKUP and not site.cols:
            read = dataclasses.replace(
                read, site=dataclasses.replace(site, role=OTHER, rows=(), batch=())
            )
        elif site.role != OTHER and site.leaf in ndims:
            batch = tuple(a for a in range(ndims[site.leaf]) if a not in (*site.rows, *site.cols))
            read = dataclasses.replace(read, site=dataclasses.replace(site, batch=batch))
        result.append(read)
    return tuple(result)


# Marks that transformations leave on a name stack around or between the modules' names.
_WRAPPED = re.compile(r"\b(jvp|transpose|vmap|jit|pjit|shard_map|remat|checkpoint)\(([^()]*)\)")
_MARKS = frozenset({"", "while", "body", "cond", "checkpoint", "rematted_computation"})


@functools.lru_cache(maxsize=1024)
def module_scope(*stacks: str) -> str:
    """Returns the module path of name stacks, outermost first, without transformations' marks.

    >>> module_scope("transpose(jvp(Model))/embed.attend", "")
    'Model/embed.attend'
    """
    text = "/".join(stacks)
    while (inner := _WRAPPED.sub(r"\2", text)) != text:
        text = inner
    # An einsum leaves its formula.
    return "/".join(p for p in text.split("/") if p not in _MARKS and "->" not in p)


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """What is known of an adapted leaf that its terms do not say: a copy has no factors.

    Attributes:
      rows, batch: axes in the leaf's layout.
      is_table: rows are picked from it by index.
    """

    rows: tuple[int, ...]
    batch: tuple[int, ...] = ()
    is_table: bool = False
