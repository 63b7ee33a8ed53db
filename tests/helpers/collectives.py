"""What a compiled program moves between devices, read off its text: XLA's, for CPUs and TPUs.

Each collective counts once for each time that it runs: one in the body of a loop as often as the
loop goes round, one that a TPU's compiler runs in pieces once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}  # fmt: skip
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (\S+|\(.*?\)) (ragged-)?({_KINDS})(-start)?\(")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations|\w+_computation)=(\S+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that devices exchange.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute".
      dtype, shape: of the array, on one device; of gathered ones the whole, of scattered ones what
        there was before.
      times: how often it runs.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int = 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What a device sends, at most, all the times that it runs: a sum's parts go twice."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.size * BYTES[self.dtype] * self.times


def collectives(compiled: Any) -> list[Collective]:
    """Returns the collectives of a compiled program, or of its text.

    Raises:
      ValueError: one is in a loop of which the compiler does not know how often it goes round.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    entry, computations = _computations(text)
    return [c for c in _of(entry, 1, computations) if c.size]


def moved(compiled: Any) -> int:
    """Returns the bytes that a device sends in a program, at most."""
    return sum(c.bytes for c in collectives(compiled))


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name, found = "", "", {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            found[name] = []
            entry = name if start[1] else entry
        elif name:
            found[name].append(line)
    return entry, found


def _of(name: str, times: int, computations: dict[str, list[str]]) -> Iterator[Collective]:
    lines = computations[name]
    starts = any("AsyncCollectiveStart" in line for line in lines)
    for line in lines:
        if (call := _COLLECTIVE.search(line)) is not None:
            # Its other pieces, within what runs meanwhile and at the end, are of the same chain.
            if starts or "chain_id=" not in line:
                yield from _arrays(line, call, times)
            continue
        for role, names in _CALLED.findall(line):
            rounds = _rounds(line, lines, computations) if role == "body" else 1
            for called in re.findall(r"%([\w.-]+)", names):
                yield from _of(called, times * rounds, computations)


def _rounds(line: str, lines: list[str], computations: dict[str, list[str]]) -> int:
    """Returns how often a loop goes round, or -1 where that cannot be read."""
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    return int(count[1]) if count else _counted(line, lines, computations)


def _counted(line: str, lines: list[str], computations: dict[str, list[str]]) -> int:
    """The same of a loop that counts up to a constant, of which XLA says nothing.

    Such is one of its own making, in which shards go round while they are multiplied.
    """
    before, after = _defined(lines), _defined(computations[_named("body", line)])
    test = _defined(computations[_named("condition", line)])
    if not (less := re.search(r"compare\(%([\w.-]+), %([\w.-]+)\), direction=LT", test["ROOT"])):
        return -1
    position = re.search(r"get-tuple-element\(.*index=(\d+)", test[less[1]])
    given = re.search(r" while\(%([\w.-]+)\)", line)
    if position is None or given is None:
        return -1
    start, stepped = (
        re.findall(r"%([\w.-]+)", re.sub(r".* tuple\(", "", text).split(")")[0])[int(position[1])]
        for text in (before[given[1]], after["ROOT"])
    )
    step = re.search(r" add\(%[\w.-]+, %([\w.-]+)\)", after[stepped])
    if step is None:
        return -1
    first, by, last = (
        _constant(start, before), _constant(step[1], after), _constant(less[2], test)
    )  # fmt: skip
    return -1 if first is None or not by or last is None else -(-(last - first) // by)


def _named(role: str, line: str) -> str:
    return re.findall(rf"{role}=%([\w.-]+)", line)[0]


def _defined(lines: list[str]) -> dict[str, str]:
    """Returns what each name is in a computation; "ROOT" is its result."""
    found = {}
    for line in lines:
        if made := re.match(r"\s*(ROOT )?%([\w.-]+) = (.*)", line):
            found.update(dict.fromkeys([made[2], *["ROOT"] * bool(made[1])], made[3]))
    return found


def _constant(name: str, defined: dict[str, str]) -> int | None:
    if copied := re.search(r" copy\(%([\w.-]+)\)", defined[name]):
        return _constant(copied[1], defined)
    value = re.search(r" constant\((\d+)\)", defined[name])
    return int(value[1]) if value else None


def _arrays(line: str, call: re.Match[str], times: int) -> Iterator[Collective]:
    if times < 0:
        raise ValueError(f"a collective in a loop of unknown length: {line.strip()}")
    kind = call[3]
    groups = _group_size(line)
    if groups == 1:
        return
    arrays = _ARRAY.findall(call[1])
    if call[4] and kind in ("all-gather", "collective-permute"):
        # Started, it returns its operands, then its results, then perhaps contexts.
        arrays = [a for a in arrays if a != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    for dtype, dims in arrays:
        shape = tuple(map(int, filter(None, dims.split(","))))
        if kind == "reduce-scatter":
            shape = (groups, *shape)
        yield Collective(kind, dtype, shape, times)


def _group_size(line: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    if meshed := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", meshed[2]))
    return 0
