"""Interleaved timings of peers in one run: medians, spread, ratios, stored with versions."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds for each case, one run of each a round, the order turning.

    The garbage collector rests while a case runs, as `timeit` has it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Returns the median of the rounds' ratios, and the quartiles."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile 1": low, "quartile 3": high}


def rounds_from_arguments(default: int = 11) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=default)
    return parser.parse_args().rounds


def store(name: str, figures: Any) -> None:
    """Prints the figures and writes them to ``results/NAME.json`` with versions and device."""
    packages = ("jax", "jaxlib", "flax", "optax", "transformers")
    record = {
        "figures": figures,
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in packages},
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)
