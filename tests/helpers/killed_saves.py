"""Kills processes that save over one folder, and says what was there after each: a program.

``python -m tests.helpers.killed_saves FOLDER KILLS HOW WHAT``: HOW is "at once" or "one by one" (a
system that cannot exchange directories), WHAT is "adapter" or "model". JAX is imported and not
started, so that forking is safe. Prints JSON: how often which save was found, bytes in the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from flax_tied_lora._peft.adapter.folder import read_adapter, write_adapter
from flax_tied_lora._peft.files import replacement
from flax_tied_lora._peft.files.safetensors_write import write_safetensors

SHARD = 40_000


def tensors(number: int) -> list:
    arrays = {f"layer{i}": np.full((50, 100), number, np.float32) for i in range(6)}
    return [(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def save_adapter(folder: Path, number: int) -> None:
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": number})
    write_adapter(folder, text, tensors(number), overwrite=True)


def save_model(folder: Path, number: int) -> None:
    """Saves shards, their index and a config, as `save_merged` does."""
    write_safetensors(
        folder, tensors(number), max_shard_size=SHARD, overwrite=True,
        texts={"config.json": json.dumps({"number": number})},
    )  # fmt: skip


def adapter_found(folder: Path) -> set[int]:
    with read_adapter(folder) as files:
        return {
            files.config["lora_alpha"],
            *(int(v) for x in dict(files.tensors).values() for v in x.flat),
        }


def model_found(folder: Path) -> set[int]:
    replacement.settle(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {json.loads((folder / "config.json").read_text())["number"]}
    for name, file in index.items():
        held |= {int(v) for v in load_file(folder / file)[name].flat}
    return held


def size(folder: Path) -> int:
    around = [p for p in folder.parent.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in around)


def main(folder: Path, kills: int, how: str, what: str) -> None:
    save, found = {
        "adapter": (save_adapter, adapter_found), "model": (save_model, model_found)
    }[what]  # fmt: skip
    if how == "one by one":
        replacement.exchange = lambda first, second: False
    save(folder, 0)
    whole, wait = size(folder), random.Random(0)
    seen: Counter[str] = Counter()
    for kill in range(kills):
        child = os.fork()
        if not child:
            for number in range(10**9):
                save(folder, 1 + number % 2)
        time.sleep(wait.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        held = found(folder)
        seen["whole" if len(held) == 1 else f"mixed {sorted(held)} at kill {kill}"] += 1
    save(folder, 3)
    json.dump({"seen": seen, "whole": whole, "after": size(folder)}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
