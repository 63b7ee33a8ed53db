"""A checkpoint's record: its format, facts about the checkpoint, and the listings of its items."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.items import encode
from flax_tied_lora._checkpoint.leftovers import Leftovers, is_local
from flax_tied_lora._checkpoint.record_checks import ITEMS, check_record
from flax_tied_lora._config.json_fields import COUNT
from flax_tied_lora._tree.lock import locked
from flax_tied_lora._tree.processes import in_one_process

FORMAT = 1
_RECORD = "tied_lora"


def absolute(path: Any) -> epath.Path:
    """Returns a path, of a cloud bucket too, in the absolute form that Orbax needs."""
    return epath.Path(path).expanduser().resolve()


def orbax_args(facts: Mapping[str, Any], items: Mapping[str, Any]) -> ocp.args.Composite:
    """Returns Orbax's arguments for writing a checkpoint.

    Args:
      facts: what the record says besides, as JSON values.
      items: pytrees by name; None for an item that the checkpoint lacks.
    """
    listings: dict[str, Any] = {}
    saves: dict[str, Any] = {}
    for name, tree in items.items():
        if tree is not None:
            arrays, listings[name] = encode(name, tree)
            if listings[name]:  # Orbax refuses an empty pytree.
                saves[name] = ocp.args.StandardSave(arrays)
    record = {"format": FORMAT, **facts, "items": listings}
    saves[_RECORD] = ocp.args.JsonSave({"record": record, "crc32": _crc32(record)})
    return ocp.args.Composite(**saves)


def write(path: Any, args: ocp.args.Composite) -> None:
    """Writes a checkpoint, which has its name only when all of it is written.

    What an earlier save under this name has left is removed, and what this one leaves if it fails.

    Raises:
      CheckpointError: there is something of this name, another save under it is running, or writing
        fails.
    """
    path = absolute(path)
    with _one_save(path):
        _write(path, args)


@contextlib.contextmanager
def _one_save(path: epath.Path) -> Iterator[None]:
    """Keeps other saves under this name out: each would remove what the other has written."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            with explained("save: cannot write", path):
                if not path.parent.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                lock = Path(path.parent / f".{path.name}.lock")
                stack.enter_context(locked(lock, Path(path), CheckpointError))

        if is_local(path):
            text = f"save: cannot write {path}: the error of process 0 says why"
            in_one_process(enter, lambda: CheckpointError(text))
        yield


def _write(path: epath.Path, args: ocp.args.Composite) -> None:
    if path.exists():
        raise CheckpointError(
            f"save: {path} exists already; name another directory, delete this one, or use a "
            "Manager, which keeps the steps of a run side by side"
        )
    leftovers = Leftovers(path.parent, path.name, mine=jax.process_index() == 0)
    leftovers.begin()
    try:
        with (
            explained("save: cannot write", path),
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            checkpointer.save(path, args=args)
    except CheckpointError:
        leftovers.failed(path.name)
        raise
    finally:
        leftovers.end()


def read_record(
    path: epath.Path, kind: Literal["plan", "ties"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint's record and the listings of its items.

    Args:
      path: of the checkpoint.
      kind: what its record must have: a plan, of adapters, or ties, of full params.

    Raises:
      CheckpointError: there is no checkpoint of this kind, or it is damaged or of a newer format.
    """
    if not path.exists():
        raise CheckpointError(f"restore: {path} does not exist; check the path")
    file = path / _RECORD / "metadata"
    if not file.exists():
        raise CheckpointError(_no_record(path, file))
    with explained("restore: damaged record in", file, "restore another checkpoint"):
        content = json.loads(file.read_text())
        record, crc32 = content["record"], content["crc32"]
        version = record["format"]
        if COUNT.fits(version) and version > FORMAT:
            raise CheckpointError(
                f"restore: {file} is of format {version}, this version of flax_tied_lora reads up "
                f"to {FORMAT}; upgrade flax_tied_lora"
            )
        if _crc32(record) != crc32:
            raise CheckpointError(
                f"restore: {file} is damaged: its checksum is {_crc32(record)}, expected {crc32}. "
                "Restore another checkpoint"
            )
        other = "plan" if kind == "ties" else "ties"
        if other in record and kind not in record:
            holds = "adapters; use restore" if kind == "ties" else "full params; use restore_params"
            raise CheckpointError(f"restore: {path} holds {holds}")
        check_record(record)
    for item in ITEMS[kind]:
        listed, there = bool(record["items"].get(item)), (path / item).exists()
        if listed != there:
            what = "is missing, though the record lists it" if listed else "is not in the record"
            raise CheckpointError(f"restore: {path / item} {what}; restore another checkpoint")
    return record, record["items"]


def _no_record(path: epath.Path, file: epath.Path) -> str:
    """Returns the error of a path that holds no record."""
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    steps = [name for name in names if (path / name / _RECORD).exists()]
    if steps:
        return (
            f"restore: {path} holds the steps {', '.join(steps)} of a run; open it with "
            f"Manager, or restore {path / steps[-1]}"
        )
    content = f"found {', '.join(names[:5]) or 'nothing'}" if path.is_dir() else "it is a file"
    return f"restore: {path} is no checkpoint of flax_tied_lora: no {file}; {content}"


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
