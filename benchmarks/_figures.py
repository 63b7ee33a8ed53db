"""Stored results read back, and what the issue that asked for them wanted of them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENOUGH = 10  # rounds; with fewer it was a trial run


@dataclasses.dataclass(frozen=True)
class Target:
    """A limit on a figure; ``aim`` is what is really after.

    ``file`` and ``label`` are regular expressions for the name of the result and of the figure.
    """

    file: str
    label: str
    limit: float
    aim: float | None = None
    least: bool = False  # at least, not at most

    def wanted(self) -> str:
        aim = "" if self.aim is None else f" (aim: {self.aim:g})"
        return f"at {'least' if self.least else 'most'} {self.limit:g}{aim}"

    def verdict(self, value: float) -> str:
        def holds(limit: float) -> bool:
            return value >= limit if self.least else value <= limit

        if not holds(self.limit):
            return "no"
        return "yes" if self.aim is None else "yes, the aim too" if holds(self.aim) else "yes"


MODELS = "(GPT-2 small|SmolLM2-135M)[^:]*"
CPU = "(?!.*-(nvidia|amd)).*"
GPU = "-(nvidia|amd).*"
COMPILING = ".*compil.*adapted / plain.*"
TARGETS = [
    Target("step", "tied / attention only", 1.05, 1.03),
    Target(f"step.*{GPU}", "tied / attention only", 1.03),
    Target("step", "densified / tied", 1.35, least=True),
    Target(f"against_peft{CPU}", f"{MODELS}: PEFT / ours", 1.15, 1.5, least=True),
    Target(
        f"against_peft{CPU}", f"{MODELS}: PEFT / ours, linear_cross_entropy", 1.25, 1.5, least=True
    ),
    Target(f"against_peft{GPU}", f"{MODELS}: PEFT / ours.*", 1.5, least=True),
    Target("linear_cross_entropy", "time / frozen, plain: tied, fused", 1.1),
    Target("linear_cross_entropy", "memory / frozen, plain: tied, fused", 0.1),
    Target("tracing", "(?!.*compil).*adapted / plain.*", 1.5),
    Target("tracing", COMPILING, 1.15),
    Target("deep", ".*10,000 layers, .*adapted / plain.*", 1.5),
    Target("decoding", "unmerged / merged.*", 1.05),
]


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> record, of every JSON file in a folder."""
    return {f.stem: json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))}


def stored_elsewhere(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the same of each folder in it: of other processors, or other peers."""
    return {f.name: stored(f) for f in sorted(folder.iterdir()) if f.is_dir()}


def is_ratio(value: Any) -> bool:
    return isinstance(value, dict) and "median" in value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def labelled(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields label and value of every ratio: with quartiles, or one number of a compiler's."""
    for key, value in figures.items():
        label = f"{prefix}{key}"
        if is_ratio(value) or (is_number(value) and " / " in label):
            yield label, value
        elif isinstance(value, dict):
            yield from labelled(value, prefix if key == "ratios" else f"{label}: ")


def is_trial(record: dict[str, Any]) -> bool:
    return record["figures"].get("rounds", ENOUGH) < ENOUGH


def against_targets(records: dict[str, dict[str, Any]]) -> Iterator[tuple[Target, str, str, Any]]:
    """Yields target, name of the result, label and value, for every figure that has a target."""
    for target in TARGETS:
        for name, record in records.items():
            for label, value in labelled(record["figures"]):
                if re.fullmatch(target.file, name) and re.fullmatch(target.label, label):
                    yield target, name, label, value
