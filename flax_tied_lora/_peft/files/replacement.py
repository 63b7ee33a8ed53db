"""New files that take the place of old ones together, in a directory that holds other files too.

Everything is first written to the disk under hidden names. Then files change places one at a time.
A reader looks for one of them first, the marker (an adapter's ``adapter_config.json``): the old
marker goes first and the new one comes last. Whoever reads in between, or after a crash in between,
finds no marker, and never one save's config with another save's weights. Where a single file
changes, beside an unchanged marker, it is replaced in one step.

An error puts everything back. A crash can leave hidden files ending in ``.incomplete`` or
``.replaced``: they are complete, and may be deleted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from flax_tied_lora._peft.files.errors import AdapterFileError, operating_system

INCOMPLETE, REPLACED = ".incomplete", ".replaced"


class Replacement:
    """Files on their way into a directory; made by `replacement`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._token = secrets.token_hex(6)
        self._written: list[str] = []

    def write(self, name: str, content: Iterable[Any]) -> None:
        """Writes a file that `commit` will put under this name.

        Args:
          name: its name.
          content: its bytes, in chunks; each is written before the next one is asked for.
        """
        path = self._hidden(name, INCOMPLETE)
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
                os.replace(self._hidden(new[0], INCOMPLETE), self.directory / new[0])
                _sync(self.directory)
            else:
                self._exchange(new, gone, marker)
        self.discard()

    def discard(self) -> None:
        """Removes what was written and not put in place."""
        for name in self._written:
            with contextlib.suppress(OSError):
                self._hidden(name, INCOMPLETE).unlink(missing_ok=True)

    def _exchange(self, new: list[str], old: list[str], marker: str) -> None:
        """Moves the old files away and the new ones in; an error moves all of them back."""
        removed: list[str] = []
        placed: list[str] = []
        try:
            for name in sorted(old, key=lambda n: n != marker):
                removed.append(name)
                os.replace(self.directory / name, self._hidden(name, REPLACED))
                if name == marker:
                    _sync(self.directory)
            for name in sorted(new, key=lambda n: n == marker):
                if name == marker:
                    _sync(self.directory)
                placed.append(name)
                os.replace(self._hidden(name, INCOMPLETE), self.directory / name)
            _sync(self.directory)
        except BaseException:
            # An interrupt may come before or after the step that the list already names.
            for name in reversed(placed):
                if not os.path.lexists(self._hidden(name, INCOMPLETE)):
                    os.replace(self.directory / name, self._hidden(name, INCOMPLETE))
            for name in reversed(removed):
                if os.path.lexists(self._hidden(name, REPLACED)):
                    os.replace(self._hidden(name, REPLACED), self.directory / name)
            raise
        for name in removed:
            with contextlib.suppress(OSError):
                self._hidden(name, REPLACED).unlink()

    def _same(self, name: str) -> bool:
        old, new = self.directory / name, self._hidden(name, INCOMPLETE)
        return old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes()

    def _hidden(self, name: str, ending: str) -> Path:
        return self.directory / f".{name}.{self._token}{ending}"


@contextlib.contextmanager
def replacement(directory: Path) -> Iterator[Replacement]:
    """Yields a `Replacement` for a directory, made if need be; without `commit` nothing changes."""
    made = _make(directory)
    files = Replacement(directory)
    try:
        yield files
    except BaseException:
        files.discard()
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


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
