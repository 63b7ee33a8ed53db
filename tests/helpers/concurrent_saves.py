"""Processes that save under one name and read it, all at once: a program.

``python -m tests.helpers.concurrent_saves FOLDER SAVERS SECONDS WHAT HOW``: as many that save as
read; HOW is "processes" or "threads". WHAT is "adapter", of PEFT's files, which each save replaces,
or "checkpoint", of Orbax, which none replaces: all are after the same next name. Each save has a
number of its own, which all of its arrays tell, and its config or step. JAX is imported here and
started in the processes, so that forking is safe. Prints JSON: how often there was what, and what
is left in the end.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import random
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint, peft
from tests.helpers import processes

ROOT = Path(__file__).parents[2]
# What a saver may be told, and a reader.
TOLD = {
    "another save into it is running": "running",
    "exists already": "there",
    "replaced while it was read": "replaced",
}
LAYER = {name: {"kernel": np.ones((24, 24), np.float32)} for name in ("q_proj", "v_proj")}
PARAMS = {"model": {"layers": {str(i): {"self_attn": LAYER} for i in range(4)}}}


def adapted_of(saver: int) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(r=8, lora_alpha=1 + saver, target_modules=[*LAYER])
    return tied_lora.wrap(PARAMS, config)


def filled(adapted: tied_lora.Adapted, number: int) -> tied_lora.Adapted:
    full = jax.tree.map(lambda x: np.full(x.shape, number, np.float32), adapted.adapters)
    return adapted.replace(adapters=full)


def whose(adapted: tied_lora.Adapted, savers: int) -> int | str:
    """Returns the number of the save that all of an adapter is from."""
    numbers = {int(v) for x in jax.tree.leaves(adapted.adapters) for v in np.unique(x)}
    alpha = adapted.plan.config.lora_alpha
    if len(numbers) == 1 and alpha == 1 + (number := numbers.pop()) % savers:
        return number
    return f"a mixture: of saves {sorted(numbers)}, config of saver {alpha - 1}"


class Adapter:
    """One adapter's files, which each save replaces."""

    def __init__(self, folder: Path, savers: int) -> None:
        self.folder, self.savers, self.names = folder, savers, peft.names_of("llama")

    def save(self, adapted: tied_lora.Adapted, number: int) -> str:
        peft.save_adapter(self.folder, filled(adapted, number), self.names, overwrite=True)
        return "saved"

    def read(self) -> str:
        found = whose(peft.load_adapter(self.folder, PARAMS, self.names), self.savers)
        return found if isinstance(found, str) else "read"


class Checkpoint:
    """Checkpoints beside each other, each of which only one of the savers can make."""

    def __init__(self, folder: Path, savers: int) -> None:
        self.folder, self.savers, self.next = folder, savers, 0

    def save(self, adapted: tied_lora.Adapted, number: int) -> str:
        while (path := self.folder / str(self.next)).exists():
            self.next += 1
        checkpoint.save(path, filled(adapted, number), step=number)
        found = self.found(path)
        return "saved" if found == number else f"saved {number}, and there is {found}"

    def read(self) -> str:
        names = [p for p in self.folder.iterdir() if p.name.isdigit()]
        found = self.found(random.choice(names))
        return found if isinstance(found, str) else "read"

    def found(self, path: Path) -> int | str:
        adapted, _, step, _ = checkpoint.restore(path, PARAMS)
        found = whose(adapted, self.savers)
        return found if found == step else f"a mixture: step {step} with {found}"


def work(kind: Any, saver: int | None, ready: Any, seconds: float, results: Any) -> None:
    """Saves, or reads, until the time is over."""
    seen: Counter[str] = Counter()
    step: Callable[[], str] = kind.read
    if saver is not None:
        adapted, numbers = adapted_of(saver), iter(range(saver, 10**9, kind.savers))
        step = lambda: kind.save(adapted, next(numbers))  # noqa: E731
    if ready is not None:
        kind.read()
        ready.wait()
    until = time.monotonic() + seconds
    while not seen or time.monotonic() < until:
        try:
            seen[step()] += 1
        except Exception as error:
            told = [short for text, short in TOLD.items() if text in str(error)]
            seen[told[0] if told else "".join(traceback.format_exception(error))] += 1
    results.put(seen)


def main(folder: Path, savers: int, seconds: float, what: str, how: str) -> None:
    folder.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    made: tuple[Any, ...] = (fork.Queue, fork.Barrier, fork.Process)
    if how == "threads":
        made = (queue.Queue, threading.Barrier, threading.Thread)
    queue_of, barrier_of, process_of = made
    results, ready = queue_of(), barrier_of(2 * savers)
    kind = {"adapter": Adapter, "checkpoint": Checkpoint}[what](folder, savers)

    def start(saver: int | None, *args: Any) -> Any:
        process = process_of(target=work, args=(kind, saver, *args, results), daemon=True)
        process.start()
        return process

    start(0, None, 0.0).join()  # something to read
    roles = [*range(savers), *[None] * savers]
    started = [start(saver, ready, seconds) for saver in roles]
    seen = sum((results.get(timeout=seconds + 300) for _ in range(1 + len(started))), Counter())
    for process in started:
        process.join()
    of_adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    around = [p for p in folder.iterdir() if not p.name.isdigit() and p.name not in of_adapter]
    left = [p.name for p in [*around, *folder.parent.glob(".*")]]
    json.dump({"seen": seen, "left": left}, sys.stdout)


def campaign(folder: Path, savers: int, seconds: float, what: str, how: str) -> dict[str, int]:
    """Runs the program; returns how often there was what, after a check that all of it may be."""
    command = [sys.executable, "-m", "tests.helpers.concurrent_saves", str(folder), str(savers)]
    done = subprocess.run(
        [*command, str(seconds), what, how], capture_output=True, text=True, cwd=ROOT, check=False,
        env=processes.environment(1),
    )  # fmt: skip
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout)
    seen = result["seen"]
    assert set(seen) <= {"saved", "read", *TOLD.values()}, "\n".join(seen)
    assert seen["saved"] > 1
    assert seen["read"] > 1
    assert not result["left"]
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
