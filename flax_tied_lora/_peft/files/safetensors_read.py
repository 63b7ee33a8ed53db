"""Tensors read from safetensors files, one at a time.

The safetensors library judges each file. The data are then read with plain reads and not through
its memory map, because a file's mapped pages stay in the process's memory, and because a file that
is cut short while it is mapped kills the process.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_tied_lora._peft.files import safetensors_format as formats
from flax_tied_lora._peft.files.errors import AdapterFileError, listed, operating_system, shown
from flax_tied_lora._peft.files.safetensors_header import (
    AGAIN,
    header_length,
    judge_by_the_library,
    read_into,
)
from flax_tied_lora._peft.files.strict_json import parse_object, read_object


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor in a file: where its bytes start, its shape and its dtype."""

    path: Path
    file: IO[bytes]
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or more safetensors files by name, each read when it is asked for.

    Shapes and dtypes come from the headers. The files stay open, so what is read is what was opened
    even if they are replaced; `close`, or leaving a ``with``, closes them. ``metadata`` are the
    strings of the headers.
    """

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._files: list[IO[bytes]] = []
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, _close, self._files)

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads a tensor.

        Raises:
          KeyError: there is none of this name.
          AdapterFileError: its bytes cannot be read.
        """
        entry = self._entries[name]
        if not self._close.alive:
            raise ValueError(f"{entry.path}: closed; read {shown(name)} before closing it")
        array = np.empty(entry.shape, entry.dtype)
        if array.size:
            raw = array.reshape(-1).view(np.uint8).data
            with self._lock, operating_system(entry.path, f"read tensor {shown(name)}"):
                entry.file.seek(entry.start)
                count = read_into(entry.file, raw)
            if count < len(raw):
                raise AdapterFileError(
                    f"{entry.path}: found {count} bytes of tensor {shown(name)}; expected "
                    f"{len(raw)}; {AGAIN}"
                )
            if entry.dtype == bool and array.view(np.uint8).max() > 1:
                raise AdapterFileError(
                    f"{entry.path}: found bytes above 1 in tensor {shown(name)}; expected truth "
                    f"values; {AGAIN}"
                )
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype, without reading it."""
        return self._entries[name].dtype

    def check_finite(self) -> None:
        """Reads every tensor.

        Raises:
          AdapterFileError: one holds NaN or infinity.
        """
        for name, entry in self._entries.items():
            array = self[name]
            if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
                continue
            bad = int(array.size - np.isfinite(array).sum())
            if bad:
                raise AdapterFileError(
                    f"{entry.path}: found {bad} of {array.size} values of tensor {shown(name)} to "
                    "be NaN or infinite; expected finite values; the training that made them "
                    "diverged, or the file is damaged: take an earlier save"
                )

    def close(self) -> None:
        """Closes the files; shapes and dtypes can still be asked for."""
        self._close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        """Says whether there is such a tensor; without this, `Mapping` would read it."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} of {len(self._files)} files)"

    def _open(self, path: Path) -> list[str]:
        """Opens a file and returns the names of its tensors."""
        with operating_system(path, "read the file"):
            if not path.is_file():
                raise AdapterFileError(
                    f"{path}: found nothing, or something that is no file; expected a safetensors "
                    "file; save the adapter again, or copy the file here"
                )
            file = path.open("rb", buffering=0)
        self._files.append(file)
        with operating_system(path, "read the file"):
            before = os.fstat(file.fileno())
            size = before.st_size
            length = header_length(path, file, size)
            judge_by_the_library(path, size)
            if not os.path.samestat(before, path.stat()):
                raise AdapterFileError(
                    f"{path}: found the file replaced while it was read; expected it to stay; read "
                    "it again"
                )
            raw = bytearray(length)
            file.seek(8)
            read_into(file, memoryview(raw))
        entries = parse_object(bytes(raw), path)
        self.metadata |= entries.pop(formats.METADATA, None) or {}
        for name, entry in entries.items():
            if name in self._entries:
                raise AdapterFileError(
                    f"{path}: found tensor {shown(name)}, which {self._entries[name].path.name} "
                    "holds too; expected each in one file; save the adapter again"
                )
            self._entries[name] = _entry(path, file, 8 + length, name, entry)
        return list(entries)


def open_safetensors(directory: Path, stem: str) -> Tensors:
    """Returns the tensors of ``<stem>.safetensors``, or of its shards by their index.

    Raises:
      AdapterFileError: there is neither, or both; a file is damaged, or is no safetensors file; the
        index names files outside the directory, or does not list what is in them.
    """
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise AdapterFileError(
            f"{directory}: found both {single.name} and {index.name}; expected one of them; remove "
            "the one that is of another save"
        )
    tensors = Tensors()
    try:
        if index.exists():
            _open_shards(tensors, index)
        else:
            tensors._open(single)
    except BaseException:
        tensors.close()
        raise
    return tensors


def _open_shards(tensors: Tensors, index: Path) -> None:
    weight_map = read_object(index, formats.MAX_HEADER).get("weight_map")
    if not isinstance(weight_map, dict):
        raise AdapterFileError(
            f"{index}: found no object under 'weight_map'; expected tensor names with the file of "
            "each; save the adapter again"
        )
    members: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        members.setdefault(_shard_name(index, name, file), set()).add(name)
    for file, expected in members.items():
        path = index.parent / file
        _refuse_outside(index, path)
        actual = set(tensors._open(path))
        for names, where, other in (
            (expected - actual, index.name, file),
            (actual - expected, file, index.name),
        ):
            if names:
                raise AdapterFileError(
                    f"{index}: found tensor {listed(sorted(names))} in {where} and not in {other}; "
                    "expected both to name the same; save the adapter again, or copy all of its "
                    "files again"
                )


def _shard_name(index: Path, name: str, file: Any) -> str:
    plain = isinstance(file, str) and re.fullmatch(r"[^/\\:\0]+\.safetensors", file)
    if not plain or len(file) > 255:
        raise AdapterFileError(
            f"{index}: found {shown(file)} as the file of tensor {shown(name)}; expected the name "
            "of a .safetensors file in the same directory; correct it if you trust its source"
        )
    return file


def _refuse_outside(index: Path, path: Path) -> None:
    """Refuses a link that leads out of the directory, but for those of Hugging Face's cache."""
    with operating_system(path, "read the file"):
        inside, target = index.parent.resolve(), path.resolve()
    cached = inside.parent.name == "snapshots" and target.parent == inside.parents[1] / "blobs"
    if target.parent != inside and not cached:
        raise AdapterFileError(
            f"{path}: found a link to {target}; expected a file in the same directory; copy it "
            "here if you trust its source"
        )


def _entry(path: Path, file: IO[bytes], data: int, name: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict):  # the library takes a list of the three values too
        raise AdapterFileError(
            f"{path}: found {shown(entry)} for tensor {shown(name)}; expected an object of dtype, "
            f"shape and data_offsets; {AGAIN}"
        )
    shape, kind = tuple(entry["shape"]), entry["dtype"]
    if kind not in formats.DTYPES:
        raise AdapterFileError(
            f"{path}: found tensor {shown(name)} of dtype {shown(kind)}; expected one of "
            f"{', '.join(formats.DTYPES)}; convert it with the library that wrote it"
        )
    if not formats.can_be_array(shape, formats.DTYPES[kind]):
        raise AdapterFileError(
            f"{path}: found tensor {shown(name)} of {len(shape)} axes and shape {shown(shape)}; "
            f"expected a shape that an array can have; {AGAIN}"
        )
    return _Entry(path, file, data + entry["data_offsets"][0], shape, formats.DTYPES[kind])


def _close(files: list[IO[bytes]]) -> None:
    for file in files:
        file.close()
