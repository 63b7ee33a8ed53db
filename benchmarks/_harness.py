"""Interleaved timings of peers in one run: medians, spread, ratios, stored with versions."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "torch", "peft")
MIB = 2**20
CHUNKED = ("linear_cross_entropy", "fused")  # names of programs with a loop over chunks
# Memory that is freed stays with the process, whose pages are not cleared again for the next step.
KEPT_MEMORY = (
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
)
SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD")  # environment variables that are part of a command


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns seconds for each case, one run of each a round, the order turning.

    The garbage collector rests while a case runs, as `timeit` has it.

    Args:
      clock: `time.process_time` for what one thread does, whatever else the machine is at.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            gc.collect()
            gc.disable()
            start = clock()
            cases[name]()
            seconds[name].append(clock() - start)
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Returns the median of the rounds' ratios, and the quartiles."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "quartile 1": low, "quartile 3": high}


def beside_plain(what: str, seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns the figures of one kind: forward and gradient, adapted and by hand, over plain."""
    found = {}
    for name, beside in (("forward", ""), ("gradient", " gradient of the same leaves")):
        for peer in ("adapted", "by hand"):
            key = f"{what}{name}, {peer} / plain{beside}"
            found[key] = ratio(seconds, f"{name}, {peer}", f"{name}, plain")
    return found


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def costs(compiled: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns what the compiler reports: temporary memory and FLOPs of each program.

    It counts the body of a loop once, so a program with one around its products has no FLOPs here.
    """
    return {
        "temporary MiB": {
            n: c.memory_analysis().temp_size_in_bytes / MIB for n, c in compiled.items()
        },
        "GFLOP": {
            n: c.cost_analysis()["flops"] / 1e9
            for n, c in compiled.items()
            if not any(word in n for word in CHUNKED)
        },
    }


def check_equal(losses: Mapping[str, float]) -> None:
    """Ends the program where peers compute different things: a benchmark of those is worthless."""
    # Elsewhere products of float32 are not of float32's precision unless one asks for it.
    limit = 1e-4 if jax.default_backend() == "cpu" else 3e-2
    if max(losses.values()) - min(losses.values()) > limit:
        raise SystemExit(f"peers whose first losses differ by more than {limit}: {losses}")


def parser(text: str | None = None, rounds: int | None = 11) -> argparse.ArgumentParser:
    """Returns the options that every program has; without rounds, of one that times nothing."""
    result = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    if rounds:
        result.add_argument("--rounds", type=int, default=rounds, help=f"({rounds})")
    result.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    result.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    return result


def rounds_from_arguments(default: int = 11) -> int:
    return parser(rounds=default).parse_args().rounds


def store(name: str, figures: Any) -> None:
    """Prints the figures and writes them to ``NAME.json`` with versions, command and device.

    The file is in the folder of the option ``--output``; of a device other than the CPU it is
    called ``NAME-DEVICE.json``, and with `KEPT_MEMORY` in GLIBC_TUNABLES ``NAME-kept-memory.json``.
    """
    device = jax.devices()[0]
    set_to = {n: v for n in SETTINGS if (v := os.environ.get(n))}
    program = f"python benchmarks/{Path(sys.argv[0]).name}"
    command = [*(f"{n}={v}" for n, v in set_to.items()), program, *sys.argv[1:]]
    name += "-kept-memory" if KEPT_MEMORY in set_to.get("GLIBC_TUNABLES", "") else ""
    record = {
        "figures": figures,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(command),
        "device": f"{device.device_kind} x {jax.device_count()}, {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "peak MiB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p))},
    }
    options = parser().parse_known_args()[0]
    folder = options.output
    if options.tiny and folder == RESULTS:
        raise SystemExit("figures of a tiny shape are not kept: give a folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    if device.platform != "cpu":
        name += "-" + re.sub(r"\W+", "-", device.device_kind.lower())
    text = json.dumps(record, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text)
    print(text)


def cores() -> int:
    """Returns how many cores the process may use; ``taskset -c 0,1`` makes it two."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def processor() -> str:
    """Returns the processor's name as Linux has it, elsewhere what Python knows of it."""
    try:
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Returns the installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
