"""Directories of adapters, taken apart, put together again, and damaged at random.

Cases of damage that have a name are in damage_cases.py and damage_shards.py.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = WEIGHTS + ".index.json"
SHARDS = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]

Files = dict[str, bytes]


def snapshot(directory: Path) -> Files:
    """Returns the files of a directory, hidden ones too; a folder in it is named with a slash."""
    return {
        path.name + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(directory.iterdir())
    }


def put(files: Files, directory: Path) -> None:
    """Gives a directory these files and no others."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and the bytes after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def unparse(header: Any, body: bytes) -> bytes:
    """Returns a safetensors file; the header as a value or as JSON text."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + body


def reshard(directory: Path) -> None:
    """Splits the weights over two files with an index, by means of the safetensors library."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
    (directory / INDEX).write_text(json.dumps(index))


_JUNK: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, 2**31, 2**63, 10**30, "", "\ud800", "x" * 5000, "../x", "LORA",
    [], [None], [[[]]], {}, {"a": {"b": []}}, [1] * 70, [0, 2**62, 2**62], "F64", "BF16", "F4",
]  # fmt: skip


def random_damage(files: Files, seed: int) -> tuple[str, Files]:
    """Returns what was done, and a copy of the files to which it was done: one to three changes."""
    rng = random.Random(seed)
    damaged, done = dict(files), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        names = sorted(n for n in damaged if n.endswith((".json", ".safetensors")))
        if not names:
            break
        name = rng.choice(names)
        kinds = [*_BYTES, *([_EDITS[name.endswith(".json")]] * 6), _files]
        change = rng.choice(kinds)
        if change is _files:
            _files(rng, damaged, name)
        else:
            damaged[name] = change(rng, damaged[name])
        done.append(f"{change.__name__.strip('_')} {name}")
    return f"seed {seed}: {', '.join(done)}", damaged


def _files(rng: random.Random, files: Files, name: str) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = b""
    elif kind == 2:
        files[name] = files[rng.choice(sorted(files))]
    else:
        files[INDEX] = files[name]


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    # Half of them where a bit says most: in the length and the header.
    most = len(data) if rng.random() < 0.5 else min(len(data), 400)
    for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
        changed[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 8, 100])) + data[at:]


def _remove(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice([1, 4, 50]) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[at:]


def _blank(rng: random.Random, data: bytes) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:at] + rng.choice([b"\0", b"\xff", b" "]) * (end - at) + data[end:]


_BYTES = [_flip_bits, _truncate, _insert, _remove, _repeat, _blank]


def _edit_header(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        length = int.from_bytes(data[:8], "little")
        n = rng.choice([0, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        return min(max(n, 0), 2**64 - 1).to_bytes(8, "little") + data[8:]
    try:
        header, body = parse(data)
        names = [n for n in header if isinstance(header[n], dict)]
        name = rng.choice(names)
    except (ValueError, IndexError, TypeError, RecursionError):
        return _flip_bits(rng, data)
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0 and entry:
        entry[rng.choice(sorted(entry))] = rng.choice(_JUNK)
    elif kind == 1:
        numbers = entry.get(rng.choice(["shape", "data_offsets"]))
        if isinstance(numbers, list) and numbers:
            at = rng.randrange(len(numbers))
            numbers[at] = rng.choice([0, 1, 2**40, 2**62, -1, rng.randrange(200)])
    elif kind == 2:
        header[rng.choice(["", "x", "../x", "__metadata__", "\ud800"])] = header.pop(name)
    elif kind == 3:
        header[name] = rng.choice(_JUNK)
    elif kind == 4:
        header["extra"] = rng.choice([*_JUNK, entry])
    else:
        del header[name]
    return unparse(header, body)


def _edit_json(rng: random.Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
        key = rng.choice(sorted(value))
    except (ValueError, IndexError, TypeError, RecursionError):
        return _flip_bits(rng, data)
    kind = rng.randrange(6)
    if kind < 3:
        value[key] = rng.choice([*_JUNK, float("nan")])
    elif kind == 3:
        del value[key]
    elif kind == 4:
        value["extra"] = rng.choice(_JUNK)
    text = json.dumps(value)
    if kind == 5:
        text = text[:-1] + rng.choice([f", {json.dumps(key)}: 1}}", ', "deep": ' + "[" * 2000])
    return text.encode("utf-8", "surrogatepass")


_EDITS = {True: _edit_json, False: _edit_header}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Says whether tensors have the same names, shapes, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes()
        for n in a
    )
