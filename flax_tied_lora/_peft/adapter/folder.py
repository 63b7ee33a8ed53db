"""A directory with a LoRA adapter as PEFT 0.21.2 writes it: ``adapter_config.json`` and tensors.

The config is the JSON object as it is in the file, and the tensors have the file's names and
layouts: what they mean is known elsewhere. A pickle is never opened.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_tied_lora._peft.files.errors import AdapterFileError, listed, operating_system, shown
from flax_tied_lora._peft.files.replacement import settle
from flax_tied_lora._peft.files.safetensors_read import Tensors, open_safetensors
from flax_tied_lora._peft.files.safetensors_write import write_safetensors
from flax_tied_lora._peft.files.strict_json import parse_object, read_object

CONFIG = "adapter_config.json"
STEM = "adapter_model"
PICKLE = "adapter_model.bin"
# A config that lists every token and every layer of a large model has a few million bytes.
MAX_CONFIG = 10_000_000
# How often a reader begins again where files are replaced while it reads, and how long it waits.
_TRIES = 20
_WAIT = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterFiles:
    """An adapter as it is in its files; leaving a ``with`` closes them.

    Attributes:
      directory: where the files are.
      config: what ``adapter_config.json`` holds; its ``peft_type`` is ``"LORA"``.
      tensors: the tensors under the names that they have in the files.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Tensors

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Returns a directory's adapter: the config read and checked, the tensors not read yet.

    Args:
      directory: what PEFT's ``save_pretrained`` or `write_adapter` wrote: a config, and one
        safetensors file, or shards and their index.

    Raises:
      AdapterFileError: a file is missing, damaged, or of another kind, or the adapter is of another
        method than LoRA.
    """
    directory = Path(directory)
    _check_directory(directory)
    config = directory / CONFIG
    for attempt in range(_TRIES):
        busy = settle(directory)
        before = _identity(config)
        try:
            files = _read(directory)
        except AdapterFileError:
            last = attempt == _TRIES - 1
            if _identity(config) == before and (last or not busy):
                raise
            time.sleep(attempt * _WAIT)
            continue
        # A save puts a new config in place together with the tensors, or after them: if it is still
        # the same one, the tensors belong to it.
        if _identity(config) == before:
            return files
        files.tensors.close()
    raise AdapterFileError(
        f"{config}: found the file replaced while it was read, {_TRIES} times; expected it to "
        "stay; read it again when nothing saves to this directory"
    )


def write_adapter(
    directory: str | os.PathLike[str],
    config_json: str,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], Any]]],
    *,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    readme: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a directory that PEFT's ``from_pretrained`` reads: config, tensors, and a README.

    All or nothing is written, the config last; see `write_safetensors`. An adapter in the directory
    is replaced, with its shards or its pickle; other files stay.

    Args:
      directory: where to write; made if it does not exist.
      config_json: the text of ``adapter_config.json``.
      tensors: name, shape, dtype and a function that returns the array.
      max_shard_size: bytes in a file at most, or "5GB". PEFT 0.21.2 reads no shards: leave it at
        None, one file, for PEFT.
      metadata: strings for the header of the tensors' file; default ``{"format": "pt"}``.
      readme: text of a ``README.md``, for a directory that has none.
      overwrite: whether to replace an existing adapter; False: it is an error.

    Raises:
      AdapterFileError: `read_adapter` would refuse the config; or as `write_safetensors`.
      Exception: what a tensor's function raises, as it is.
    """
    directory = Path(directory)
    data = config_json.encode("utf-8", "surrogatepass")
    _check_method(directory / CONFIG, parse_object(data, directory / CONFIG))
    write_safetensors(
        directory,
        tensors,
        stem=STEM,
        max_shard_size=max_shard_size,
        metadata=metadata,
        texts={CONFIG: config_json},
        extras={} if readme is None else {"README.md": readme},
        stale=[PICKLE],
        overwrite=overwrite,
    )


def _read(directory: Path) -> AdapterFiles:
    config = directory / CONFIG
    if _identity(config) is None:
        _refuse_without_config(directory)
    fields = read_object(config, MAX_CONFIG)
    _check_method(config, fields)
    _check_weights(directory)
    return AdapterFiles(directory, fields, open_safetensors(directory, STEM))


def _check_directory(directory: Path) -> None:
    with operating_system(directory, "read the directory"):
        if directory.is_dir():
            return
        if directory.exists():
            raise AdapterFileError(
                f"{directory}: found a file; expected the directory of an adapter; pass "
                f"{directory.parent}, if it holds {CONFIG}"
            )
    raise AdapterFileError(
        f"{directory}: found nothing; expected the directory of an adapter on this machine; check "
        "the path; one on a hub or in a bucket has to be downloaded first"
    )


def _refuse_without_config(directory: Path) -> None:
    with operating_system(directory, "read the directory"):
        names = sorted(path.name for path in directory.iterdir())
        inner = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    if inner:
        why = f"there are adapters in {listed(inner)}: pass one of these directories"
    else:
        why = "save the adapter again, or copy all of its files"
    files = listed(names) if names else "no files"
    raise AdapterFileError(f"{directory}: found {files}; expected {CONFIG} among them; {why}")


def _check_method(config: Path, fields: Mapping[str, Any]) -> None:
    method = fields.get("peft_type")
    if method != "LORA":
        what = "no peft_type" if "peft_type" not in fields else f"peft_type {shown(method)}"
        raise AdapterFileError(
            f"{config}: found {what}; expected 'LORA', the only one of PEFT's methods that is "
            "read here; train a LoRA adapter, or merge this one with PEFT"
        )


def _check_weights(directory: Path) -> None:
    single, index = (directory / f"{STEM}.safetensors{end}" for end in ("", ".index.json"))
    if single.exists() or index.exists():
        return
    if (directory / PICKLE).exists():
        raise AdapterFileError(
            f"{directory / PICKLE}: found a pickle, which can run any code when it is opened; "
            f"expected {single.name}; if you trust its source, convert it where PyTorch is: "
            f"safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), "
            f"{single.name!r}, metadata={{'format': 'pt'}})"
        )
    with operating_system(directory, "read the directory"):
        names = sorted(path.name for path in directory.iterdir())
    raise AdapterFileError(
        f"{directory}: found {listed(names)}; expected {single.name} among them; save the adapter "
        "again, or copy all of its files"
    )


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns what differs after a file was replaced, or None if there is no file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
