"""Tensors written to safetensors files, with one of them in memory at a time.

The safetensors library takes all tensors at once. The files written here equal the library's, byte
for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_tied_lora._peft.files import safetensors_format as formats
from flax_tied_lora._peft.files.errors import AdapterFileError, listed, operating_system, shown
from flax_tied_lora._peft.files.replacement import replacement
from flax_tied_lora._tree.processes import in_one_process

_CHUNK = 2**24
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class TensorSource(NamedTuple):
    """A tensor to be written: what it is, and a function that makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], Any]


def write_safetensors(
    directory: str | Path,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], Any]]],
    *,
    stem: str = "model",
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    extras: Mapping[str, str] | None = None,
    stale: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Writes tensors to ``<stem>.safetensors``, or to shards of it and their index.

    An existing directory keeps its other files, and all of its files if anything fails. What is
    replaced is replaced together: see `replacement`. Of several processes that call this, the first
    writes.

    Args:
      directory: where to write; made if it does not exist.
      tensors: name, shape, dtype and a function without arguments that returns the array (NumPy's
        or JAX's, none that is spread over processes), called once. Only one array is held at a
        time.
      stem: "model" as transformers reads it, "adapter_model" as PEFT does.
      max_shard_size: bytes of tensors in a file at most, as an int or as "5GB"; a larger tensor
        has a file of its own. None: one file.
      metadata: strings for the header; by default ``{"format": "pt"}``, which transformers needs.
      texts: other files that belong to the tensors, name to text; the last one is put in place
        last, so it should be the one that readers look for first.
      extras: files to write where the directory has none of that name, name to text.
      stale: names of files to remove that the new ones replace.
      overwrite: whether to replace existing files; False: they are an error.

    Raises:
      AdapterFileError: files exist; a name, shape or dtype cannot be stored; an array is not as
        announced; or the operating system refuses.
      Exception: what a tensor's function raises, as it is.
    """
    directory = Path(directory)
    texts, metadata = dict(texts or {}), {"format": "pt"} if metadata is None else metadata
    sources = _checked(directory / f"{stem}.safetensors", tensors, metadata)
    shards = _shards(sources, _size(max_shard_size))
    files = _named(shards, stem)
    if len(files) > 1:
        texts = {f"{stem}.safetensors.index.json": _index(files), **texts}
    marker = [*files, *texts][-1]

    def write() -> None:
        with replacement(directory) as new:
            old = _files_to_replace(directory, stem, [*texts, *stale], overwrite)
            for name, members in files.items():
                new.write(name, _content(directory / name, members, metadata))
            for name, text in texts.items():
                new.write(name, [text.encode("utf-8")])
            for name, text in (extras or {}).items():
                if not (directory / name).exists():
                    new.write(name, [text.encode("utf-8")])
            new.commit(old, marker)

    in_one_process(write, lambda: AdapterFileError(
        f"{directory}: process 0, which writes for all, has failed; its own error says why"
    ))  # fmt: skip


def _files_to_replace(
    directory: Path, stem: str, names: Sequence[str], overwrite: bool
) -> list[str]:
    """Returns the names of a directory's files that the new ones replace."""
    index = f"{stem}.safetensors.index.json"
    shard = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors")
    with operating_system(directory, "list the files in it"):
        paths = list(directory.iterdir())
    old = [p for p in paths if p.name in (index, *names) or shard.fullmatch(p.name)]
    for path in old:
        if path.is_dir():
            raise AdapterFileError(
                f"{path}: found a directory; expected a file, or nothing; move it away"
            )
    if old and not overwrite:
        raise AdapterFileError(
            f"{directory}: found {listed(sorted(path.name for path in old))}; expected none of "
            "these to be there; pass overwrite=True to replace them, or another directory"
        )
    return [path.name for path in old]


def _checked(
    path: Path, tensors: Iterable[tuple[Any, ...]], metadata: Mapping[str, str]
) -> list[TensorSource]:
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            raise AdapterFileError(
                f"{path}: found metadata {shown(key)}: {shown(value)}; expected strings; convert it"
            )
    sources: dict[str, TensorSource] = {}
    for name, shape, dtype, get in tensors:
        if not _is_text(name) or name in ("", formats.METADATA):
            raise AdapterFileError(
                f"{path}: found {shown(name)} as a tensor's name; expected text in Unicode, not "
                f"empty and not {formats.METADATA!r}; rename it"
            )
        if name in sources:
            raise AdapterFileError(
                f"{path}: found two tensors named {shown(name)}; expected each name once; rename "
                "one of them"
            )
        dtype = np.dtype(dtype).newbyteorder("<")
        if dtype not in formats.NAMES:
            raise AdapterFileError(
                f"{path}: found tensor {shown(name)} of dtype {dtype}; expected one of "
                f"{', '.join(str(d) for d in formats.NAMES)}; convert it"
            )
        sizes = tuple(int(size) for size in shape)
        if min(sizes, default=0) < 0 or not formats.can_be_array(sizes, dtype):
            raise AdapterFileError(
                f"{path}: found tensor {shown(name)} of shape {shown(shape)}; expected sizes that "
                "an array can have; correct it"
            )
        sources[name] = TensorSource(name, sizes, dtype, get)
    return list(sources.values())


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _size(given: int | str | None) -> float:
    if given is None:
        return float("inf")
    units = {**_UNITS, **_BINARY_UNITS}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B\s*", str(given))
    if isinstance(given, str) and match and match[2] in units:
        size = float(match[1]) * units[match[2]]
    else:
        size = given
    if isinstance(size, bool) or not isinstance(size, int | float) or size < 1:
        raise ValueError(
            f"max_shard_size={given!r}; expected an int above 0, or a text such as '5GB', '500MB' "
            "or '2GiB'; None for one file"
        )
    return size


def _shards(sources: list[TensorSource], most: float) -> list[list[TensorSource]]:
    """Returns the tensors of each file, as transformers splits them.

    In the order given, a new file when one is full; a tensor too large for any file has its own.
    """
    shards: list[list[TensorSource]] = []
    current: list[TensorSource] = []
    held = 0
    for source in sources:
        size = formats.bytes_of(source.shape, source.dtype)
        if size > most:
            shards.append([source])
            continue
        if current and held + size > most:
            shards.append(current)
            current, held = [], 0
        current.append(source)
        held += size
    if current or not shards:
        shards.append(current)
    return [sorted(s, key=lambda t: formats.layout_order(t.name, t.dtype)) for s in shards]


def _named(shards: list[list[TensorSource]], stem: str) -> dict[str, list[TensorSource]]:
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _index(files: Mapping[str, list[TensorSource]]) -> str:
    sizes = [formats.bytes_of(t.shape, t.dtype) for tensors in files.values() for t in tensors]
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {t.name: file for file, tensors in files.items() for t in tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _content(
    path: Path, tensors: list[TensorSource], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yields a file's bytes in chunks."""
    header = formats.header([(t.name, t.shape, t.dtype) for t in tensors], metadata)
    if len(header) - 8 > formats.MAX_HEADER:
        raise AdapterFileError(
            f"{path}: found {len(tensors)} tensors, whose header takes {len(header)} bytes; "
            f"expected at most {formats.MAX_HEADER}; write shards with max_shard_size"
        )
    yield header
    for tensor in tensors:
        yield from _chunks(path, tensor)


def _chunks(path: Path, tensor: TensorSource) -> Iterator[memoryview]:
    """Yields an array's bytes in logical order; of a strided array, a chunk at a time is copied."""
    array = np.asarray(tensor.get())
    if array.shape != tensor.shape or array.dtype.newbyteorder("<") != tensor.dtype:
        raise AdapterFileError(
            f"{path}: found {array.dtype}{list(array.shape)} for tensor {shown(tensor.name)}; "
            f"expected {tensor.dtype}{list(tensor.shape)}, as announced; convert it"
        )
    if not array.size:
        return
    if array.dtype == tensor.dtype and array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8).data
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _CHUNK * len(rows) // rows.nbytes)
    for start in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[start : start + step], dtype=tensor.dtype)
        yield chunk.reshape(-1).view(np.uint8).data
