"""Kills runs that save with a `Manager`, and says what each next one finds: a program.

``python -m tests.helpers.killed_runs FOLDER KILLS``. Each run is a process of its own, which looks
at what the one before has left, and saves step after step until it is killed (SIGKILL). JAX is
imported here and started in the runs, so that forking is safe. Prints JSON: what was found, once
for each kill, and how many of the kills left something to remove.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint

KEEP = 2
SHAPE = (512, 64)
CONFIG = tied_lora.LoraConfig(r=32, target_modules=["dense"], init_lora_weights=False)


def adapted_at(adapted, step):
    """Adapters that are known from the number of their step."""
    fill = {"lora_a": np.full((SHAPE[0], 32), step, np.float32)}
    fill["lora_b"] = np.full((32, SHAPE[1]), -step, np.float32)
    return adapted.replace(adapters={"lora": {"dense/kernel": fill}})


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def look(folder: Path, params, confirmed: int) -> tuple[checkpoint.Manager, dict]:
    """Opens a run; returns its manager, and what was there."""
    before = sorted(p.name for p in folder.iterdir())
    manager = checkpoint.Manager(folder, max_to_keep=KEEP)
    steps, wrong = manager.all_steps(), []
    for step in steps:
        found = manager.restore(params, step=step)
        arrays = found.adapted.adapters["lora"]["dense/kernel"]
        same = np.all(arrays["lora_a"] == step) and np.all(arrays["lora_b"] == -step)
        if not same or found.step != step or found.extra != {"step": step}:
            wrong.append(step)
    after = sorted(p.name for p in folder.iterdir())
    return manager, {
        "wrong": wrong,
        "lost": bool(confirmed) and confirmed > max(steps, default=0),
        "left": [name for name in after if not name.isdigit()],
        "removed": [name for name in before if name not in after],
    }


def run(folder: Path, confirmed: int, report: int) -> None:
    """Looks, and saves until it is killed; writes lines of JSON."""

    def tell(**line):
        os.write(report, json.dumps(line).encode() + b"\n")

    params = {"dense": {"kernel": np.ones(SHAPE, np.float32)}}
    adapted = tied_lora.wrap(params, CONFIG)
    manager, found = look(folder, params, confirmed)
    step = (manager.latest_step() or 0) + 1
    manager.save(step, adapted_at(adapted, step), extra={"step": step})
    manager.wait_until_finished()
    kept = sum(size(folder / str(s)) for s in manager.all_steps())
    tell(found=found, saved=step, times=size(folder) / kept)
    while True:
        step += 1
        manager.save(step, adapted_at(adapted, step), extra={"step": step})
        if step % 2:
            manager.wait_until_finished()
            tell(saved=step)


def main(folder: Path, kills: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wait, confirmed, found = random.Random(0), 0, []
    for _ in range(kills + 1):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                run(folder, confirmed, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as lines:
            first = lines.readline()
            time.sleep(wait.uniform(0.0, 0.3))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            seen = [json.loads(line) for line in [first, *lines] if line.endswith("\n")]
        confirmed = seen[-1]["saved"] if seen else confirmed
        found.append({**seen[0]["found"], "times": seen[0]["times"]} if seen else None)
    json.dump(found[1:], sys.stdout)


if __name__ == "__main__":
    cache = Path(sys.argv[1]).with_name("compiled")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    main(Path(sys.argv[1]), int(sys.argv[2]))
