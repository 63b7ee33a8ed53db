"""The plots of docs/performance.md: a panel for each stored result that has such figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _figures
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Records = dict[str, dict[str, Any]]
Panels = dict[str, dict[str, Any]]  # title -> label -> value
BASE = " / attention only"


def step_times(records: Records) -> Panels:
    return {
        name: {"attention only": 1.0}
        | {k.removesuffix(BASE): v for k, v in record["figures"]["ratios"].items() if BASE in k}
        for name, record in records.items()
        if name.startswith(("step", "gemma_table"))
    }


def temporary_memory(records: Records) -> Panels:
    return {
        name: record["figures"]["temporary MiB"]
        for name, record in records.items()
        if name.startswith(("step", "gemma_table", "linear_cross_entropy"))
    }


def against_peft(records: Records) -> Panels:
    return {
        name: dict(_figures.labelled(record["figures"]))
        for name, record in records.items()
        if name.startswith("against_peft")
    }


PLOTS: dict[str, tuple[str, Callable[[Records], Panels]]] = {
    "step-time.png": ("Time of a training step, attention only = 1", step_times),
    "temporary-memory.png": ("Temporary memory of the compiled step, MiB", temporary_memory),
    "peft.png": ("Time of PEFT's step / ours", against_peft),
}


def digest(panels: Panels) -> str:
    """Returns what a plot is of; it is stored in the PNG, so that a stale one can be told."""
    return hashlib.sha256(json.dumps(panels, sort_keys=True).encode()).hexdigest()


def draw(records: Records, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, (title, panels_of) in PLOTS.items():
        if not (panels := panels_of(records)):
            continue
        heights = [len(values) + 1 for values in panels.values()]
        figure, axes = plt.subplots(
            len(panels), squeeze=False, layout="constrained",
            figsize=(8, 0.4 * sum(heights) + 0.6), height_ratios=heights,
        )  # fmt: skip
        figure.suptitle(title)
        for axis, (name, values) in zip(axes[:, 0], panels.items(), strict=True):
            _panel(axis, name, values)
        figure.savefig(folder / file, dpi=120, metadata={"Source": digest(panels)})
        plt.close(figure)


def _panel(axis: Any, name: str, values: dict[str, Any]) -> None:
    middles = [v["median"] if _figures.is_ratio(v) else v for v in values.values()]
    left = [v["median"] - v["quartile 1"] if _figures.is_ratio(v) else 0 for v in values.values()]
    right = [v["quartile 3"] - v["median"] if _figures.is_ratio(v) else 0 for v in values.values()]
    bars = axis.barh(list(values), middles, xerr=[left, right] if any(right) else None, capsize=3)
    axis.bar_label(bars, fmt="{:,.3g}", padding=6)
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_title(name, fontsize="medium", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
