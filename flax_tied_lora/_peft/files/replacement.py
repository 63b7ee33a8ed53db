"""New files that take the place of old ones together, in a directory that holds other files too.

Everything is first written to the disk in a staging directory, beside the directory or, where
there is no room, within it. Then all of it is put in place by the first of these that works:

* a single file is replaced in one step;
* the staging directory, completed by links to the files that stay, changes places with the
  directory: one step for every reader, and for a crash;
* files change places one at a time, after a note of what goes where. A reader looks for one file
  first, the marker (an adapter's ``adapter_config.json``): the old marker goes first, the new one
  comes last. After a crash in between, the next one who reads or saves carries out the note.

An error puts everything back. What a crash leaves is settled by the next save or read: whole files
go in place, others away. One save at a time is let in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from flax_tied_lora._peft.files.errors import AdapterFileError, operating_system, shown
from flax_tied_lora._peft.files.exchange import exchange
from flax_tied_lora._peft.files.strict_json import read_object
from flax_tied_lora._tree.lock import held, locked

_NOTE = ".moves.json"
_OLD = ".replaced"
_MAX_NOTE = 10_000_000


class Replacement:
    """Files on their way into a directory; made by `replacement`."""

    def __init__(self, directory: Path, staging: Path) -> None:
        self.directory, self.staging = directory, staging
        self._written: list[str] = []

    def write(self, name: str, content: Iterable[Any]) -> None:
        """Writes a file that `commit` will put under this name.

        Args:
          name: its name.
          content: its bytes, in chunks; each is written before the next one is asked for.
        """
        path = self.staging / name
        with operating_system(path, "make the file"):
            # Without a buffer: closing a file whose buffer the disk refuses would raise again.
            file = path.open("xb", buffering=0)
        self._written.append(name)
        with file:
            for chunk in content:
                _write(path, file, chunk)
                del chunk  # it may be all of a large array, and the next one is made now
            with operating_system(path, "write the file"):
                os.fsync(file.fileno())

    def commit(self, old: Iterable[str], marker: str) -> None:
        """Puts what was written in place of the old files, all of it or nothing.

        Args:
          old: names of the files that belong to what is replaced.
          marker: name of the file without which nothing reads the others.
        """
        with operating_system(self.directory, "replace the files in it"):
            new, gone = list(self._written), list(old)
            if marker in new and marker in gone and self._same(marker):
                # All but the marker first: if that is one file, it takes one step.
                rest = [name for name in new if name != marker]
                if len(rest) == 1 and set(gone) <= {marker, *rest}:
                    new, gone = rest, rest
            if len(new) == 1 and set(gone) <= set(new):
                os.replace(self.staging / new[0], self.directory / new[0])
                _sync(self.directory)
            elif not self._exchanged(gone):
                self._one_by_one(new, gone, marker)

    def _exchanged(self, old: list[str]) -> bool:
        """Puts the staging directory in the directory's place, and returns whether it could."""
        if self.staging.parent != self.directory.parent:
            return False
        kept = [e for e in os.scandir(self.directory) if e.name not in (*old, *self._written)]
        if any(entry.is_dir(follow_symlinks=False) for entry in kept):
            return False  # there are no links to directories
        linked: list[Path] = []
        try:
            for entry in kept:
                path = self.staging / entry.name
                linked.append(path)
                os.link(entry.path, path, follow_symlinks=False)
            shutil.copymode(self.directory, self.staging)
            _sync(self.staging)
            done = exchange(self.staging, self.directory)
        except (OSError, NotImplementedError):
            done = False  # a file system without links, say
        if not done:
            for path in linked:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return False
        with contextlib.suppress(OSError):
            _sync(self.directory.parent)
            self._save_what_came_meanwhile({*old, *(entry.name for entry in kept)})
        return True

    def _save_what_came_meanwhile(self, known: set[str]) -> None:
        """Moves files of other programs, written while the directories changed places, after."""
        for entry in list(os.scandir(self.staging)):
            if entry.name not in known and not (self.directory / entry.name).exists():
                os.replace(entry.path, self.directory / entry.name)

    def _one_by_one(self, new: list[str], old: list[str], marker: str) -> None:
        """Moves the old files away and the new ones in; an error moves all of them back."""
        away = self.staging / _OLD
        away.mkdir()
        removed: list[str] = []
        placed: list[str] = []
        try:
            _note(self.staging, {"new": new, "old": old})
            for name in sorted(old, key=lambda n: n != marker):
                removed.append(name)
                os.replace(self.directory / name, away / name)
                if name == marker:
                    _sync(self.directory)
            for name in sorted(new, key=lambda n: n == marker):
                if name == marker:
                    _sync(self.directory)
                placed.append(name)
                os.replace(self.staging / name, self.directory / name)
            _sync(self.directory)
        except BaseException:
            # An interrupt may come before or after the step that the list already names.
            for name in reversed(placed):
                if not os.path.lexists(self.staging / name):
                    os.replace(self.directory / name, self.staging / name)
            for name in reversed(removed):
                if os.path.lexists(away / name):
                    os.replace(away / name, self.directory / name)
            (self.staging / _NOTE).unlink(missing_ok=True)
            raise

    def _same(self, name: str) -> bool:
        old, new = self.directory / name, self.staging / name
        return old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes()


@contextlib.contextmanager
def replacement(directory: Path) -> Iterator[Replacement]:
    """Yields a `Replacement` for a directory, made if need be; without `commit` nothing changes.

    Raises:
      AdapterFileError: another save into the directory is running, or the system refuses.
    """
    made = _make(directory)
    directory = directory.resolve()
    try:
        place = _place(directory)
        with _locked(place, directory):
            for staging in _stagings(directory):
                _settle(directory, staging)
            staging = place / _hidden(directory, "saving")
            with operating_system(staging, "make the directory"):
                staging.mkdir()
            try:
                yield Replacement(directory, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def settle(directory: Path) -> bool:
    """Carries out, before a directory is read, what a save that was cut off had begun.

    Returns whether a save is under way, which may replace the files at any time. Who may not write
    there changes nothing.
    """
    directory = directory.resolve()
    left = [staging for staging in _stagings(directory) if staging.exists()]
    for staging in left:
        lock = staging.parent / _hidden(directory, "lock")
        if held(lock):
            return True
        with (
            contextlib.suppress(OSError, AdapterFileError),
            locked(lock, directory, AdapterFileError),
        ):
            _settle(directory, staging)
    return False


def _settle(directory: Path, staging: Path) -> None:
    """Rolls a save that was cut off forward where it is noted what goes where; else drops it."""
    if not staging.exists():
        return
    with operating_system(staging, "settle a save that was cut off"):
        note = staging / _NOTE
        if note.exists():
            new, old = _noted(note)
            for name in new:
                if os.path.lexists(staging / name):
                    os.replace(staging / name, directory / name)
            for name in old:
                if name not in new:
                    (directory / name).unlink(missing_ok=True)
            _sync(directory)
            note.unlink()
        shutil.rmtree(staging)


def _note(staging: Path, moves: dict[str, list[str]]) -> None:
    """Writes what goes where, whole or not at all: from here on a crash is rolled forward."""
    draft = staging / f"{_NOTE}.draft"
    with draft.open("w") as file:
        json.dump(moves, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, staging / _NOTE)
    _sync(staging)


def _noted(note: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the new files and of the old ones; a stranger may have written them."""
    moves = read_object(note, _MAX_NOTE)
    for names in (moves.get("new"), moves.get("old")):
        plain = isinstance(names, list) and all(
            isinstance(n, str) and n not in ("", ".", "..") and not {"/", "\\", "\0"} & {*n}
            for n in names
        )
        if not plain:
            raise AdapterFileError(
                f"{note}: found {shown(names)}; expected the names of files that a save was to put "
                f"in place; remove {note.parent}, and save the adapter again"
            )
    return moves["new"], moves["old"]


def _place(directory: Path) -> Path:
    """Returns where there is room for what is staged: beside the directory, or within it."""
    parent = directory.parent
    with operating_system(directory, "look at the directory"):
        beside = os.access(parent, os.W_OK | os.X_OK) and not directory.is_mount()
        return parent if beside and parent.stat().st_dev == directory.stat().st_dev else directory


def _stagings(directory: Path) -> list[Path]:
    return [place / _hidden(directory, "saving") for place in (directory.parent, directory)]


def _hidden(directory: Path, what: str) -> str:
    return f".{directory.name}.{what}"


@contextlib.contextmanager
def _locked(place: Path, directory: Path) -> Iterator[None]:
    path = place / _hidden(directory, "lock")
    with contextlib.ExitStack() as stack:
        with operating_system(path, "make the file"):
            stack.enter_context(locked(path, directory, AdapterFileError))
        yield


def _write(path: Path, file: IO[bytes], chunk: Any) -> None:
    rest = memoryview(chunk)
    with operating_system(path, "write the file"):
        while rest:
            rest = rest[file.write(rest) :]


def _make(directory: Path) -> list[Path]:
    with operating_system(directory, "make the directory"):
        if directory.exists() and not directory.is_dir():
            raise AdapterFileError(
                f"{directory}: found a file; expected a directory, or nothing; give another path"
            )
        missing = [p for p in (directory, *directory.parents) if not p.exists()]
        directory.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _sync(directory: Path) -> None:
    """Flushes the directory's entries to the disk, where the system lets a program ask for it."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
