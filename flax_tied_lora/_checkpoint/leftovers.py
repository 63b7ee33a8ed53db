"""What dead saves leave in a directory: told from what is being written, and removed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from etils import epath

from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._tree.lock import locked

try:
    import fcntl
except ImportError:  # Windows: what lives cannot be told there
    fcntl = None

# Orbax renames a step that is to go into this directory. What is in it is no step any more.
DELETED = ".deleted"
# In the directory of a run, while a step is being written.
LOCK = ".save.lock"
# In the name of what Orbax has not written to its end.
_TEMPORARY = ".orbax-checkpoint-tmp"


def is_local(path: epath.Path) -> bool:
    """Returns whether a path is in a file system, and not in a cloud bucket."""
    return "://" not in str(path)


class Leftovers:
    """Files of dead saves in a directory.

    Who saves holds a shared lock of the directory itself, which its process's death lets go of; who
    gets the lock alone knows that nobody else is saving. Cloud buckets and some file systems have
    no locks: there the next save removes what it finds, and opening removes nothing. A `Manager`
    keeps others out while it saves, by a file that says which process it is.

    Args:
      directory: that checkpoints are saved into.
      name: of the only checkpoint to look at; "" for all.
      mine: whether this process is the one that removes files; otherwise nothing is done.
    """

    def __init__(self, directory: epath.Path, name: str = "", mine: bool = True):
        self._directory, self._name, self._mine = directory, name, mine
        self._handle: int | None = None
        self._only = contextlib.ExitStack()  # holds the lock of the one save, where it is one

    def look(self) -> None:
        """Removes what dead saves have left, if it is certain that none is alive."""
        if self._mine and self._alone():
            self._remove()
            lock = Path(self._directory / LOCK)
            if lock.exists():
                with contextlib.suppress(CheckpointError, OSError), self._taken(lock):
                    pass  # a dead process's: it goes as it is let go of
        self.end()

    def begin(self, only: bool = False) -> None:
        """Removes what dead saves have left, and says to others, until `end`, that a save lives.

        Args:
          only: whether it has to be the only one that is so in the directory.

        Raises:
          CheckpointError: another one is.
        """
        if not self._mine:
            return
        if only and is_local(self._directory):
            lock = Path(self._directory / LOCK)
            with explained("save: cannot write", self._directory):
                self._only.enter_context(self._taken(lock))
        if self._alone() is not False:
            self._remove()
        if self._handle is not None and fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_SH)

    def end(self) -> None:
        """Says that no save lives any more."""
        self._only.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def failed(self, name: str) -> None:
        """Removes what was written of a checkpoint of this name, whose saving has failed."""
        if self._mine:
            _remove_all(self._directory, name + _TEMPORARY)

    def remove_deleted(self) -> None:
        """Removes what was renamed to be removed."""
        if self._mine:
            with contextlib.suppress(OSError):
                (self._directory / DELETED).rmtree(missing_ok=True)

    def _taken(self, lock: Path) -> contextlib.AbstractContextManager[None]:
        return locked(lock, lock.parent, CheckpointError)

    def _remove(self) -> None:
        self.remove_deleted()
        _remove_all(self._directory, self._name + _TEMPORARY if self._name else "")

    def _alone(self) -> bool | None:
        """Takes the lock, and returns whether nobody had it; None where there are no locks."""
        if fcntl is None or not is_local(self._directory):
            return None
        try:
            if self._handle is None:
                self._handle = os.open(self._directory, os.O_RDONLY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True


def _remove_all(directory: epath.Path, prefix: str) -> None:
    """Removes temporary directories whose names begin so; one that cannot go stays for later."""
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            if _TEMPORARY in path.name and path.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    path.rmtree(missing_ok=True)
