"""The TPU's compiler without a TPU, and what its programs say: memory, FLOPs, estimated cycles."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

# libtpu otherwise asks a cloud machine's metadata server which TPU it is on, and waits for it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
from jax.experimental import topologies

SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
# These name an array that is already there.
NOT_MADE = "parameter|bitcast|get-tuple-element|tuple|copy-done|constant|while|opt-barrier"


def devices(topology: str = "v5e:2x2") -> list[Any]:
    """Returns devices that programs can be compiled for, and not run on."""
    return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def compiled(function: Callable[..., Any], *args: Any, device: Any) -> Any:
    """Returns a function compiled for one device; `args` are `jax.ShapeDtypeStruct`."""
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(function, in_shardings=place, out_shardings=place).lower(*args).compile()


def versions(device: Any) -> dict[str, str]:
    return {"chip": device.device_kind, "libtpu": metadata.version("libtpu")}


def figures(program: Any) -> dict[str, float]:
    """Returns what the compiler says of a program."""
    cost = program.cost_analysis()
    return {
        "temporary bytes": program.memory_analysis().temp_size_in_bytes,
        "FLOPs": cost["flops"],
        "bytes accessed": cost["bytes accessed"],
        "estimated cycles": estimated_cycles(program.as_text()),
    }


def computations(text: str) -> dict[str, list[str]]:
    """Returns the instructions of each computation in an HLO text; the entry's name is ''."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if start:
            name = "" if start[1] else start[2]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def steps(condition: list[str]) -> int:
    """Returns how often a loop that counts from 0 runs, from the instructions of its condition."""
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(limits) != 1 or "direction=LT" not in condition[-1]:
        raise ValueError(f"not a loop that counts up to a constant: {condition}")
    return int(limits[0])


def executed(text: str) -> Iterator[tuple[str, int]]:
    """Yields the instructions that run by themselves, not inside of a fusion, and how often."""
    found = computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in found[name]:
            yield line, times
            loop = re.search(r"while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line)
            if loop:
                yield from walk(loop[2], times * steps(found[loop[1]]))

    return walk("", 1)


def estimated_cycles(text: str) -> int:
    """Returns the sum of what the compiler's cost model estimated for each instruction."""
    return sum(
        times * int(found[1])
        for line, times in executed(text)
        if (found := re.search(r'"estimated_cycles":"(\d+)"', line))
    )


def made(text: str, entries: int) -> list[str]:
    """Returns the types of arrays of so many entries that the program writes to memory."""
    return [
        f"{kind}[{dims}]"
        for line, _ in executed(text)
        if (call := re.search(r"= (.*?) ([\w-]+)\(", line)) and not re.fullmatch(NOT_MADE, call[2])
        for kind, dims in SHAPE.findall(call[1])
        if math.prod(map(int, filter(None, dims.split(",")))) == entries
    ]
