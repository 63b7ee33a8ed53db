"""One save into a directory at a time: a lock that its process's death lets go of."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: saves are not kept apart there
    fcntl = None

# Seconds: a reader who looks whether a save is under way has the lock for a moment.
_PATIENCE = 0.5


def held(path: Path) -> bool:
    """Returns whether a process that lives holds a lock; a file that nobody can lock is not."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR)
        try:
            return not _taken(handle)
        finally:
            os.close(handle)
    return False


@contextlib.contextmanager
def locked(path: Path, directory: Path, error: type[Exception]) -> Iterator[None]:
    """Holds the lock of a directory, which is a file that is gone when nobody saves.

    Args:
      path: of the lock.
      directory: what is saved into, for the error.
      error: its type.

    Raises:
      Exception: of the type ``error``: another save holds it. One whose process has died does not.
      OSError: the file cannot be made.
    """
    handle = _acquired(path, directory, error)
    try:
        yield
    finally:
        try:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: who has opened it sees that it is gone
        finally:
            os.close(handle)


def _acquired(path: Path, directory: Path, error: type[Exception]) -> int:
    until = time.monotonic() + _PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _taken(handle):
                if _is_at(handle, path):
                    os.truncate(handle, 0)
                    os.pwrite(handle, json.dumps(_myself()).encode(), 0)
                    return handle
            elif time.monotonic() > until:
                raise error(_running(handle, directory))
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(_PATIENCE / 50)


def _taken(handle: int) -> bool:
    """Takes a lock, and returns whether nobody else had it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Returns whether an open lock is the one at its path: who held it may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _myself() -> dict[str, object]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}


def _running(handle: int, directory: Path) -> str:
    """Returns what is said of a save that is under way: by whom and since when."""
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(os.pread(handle, 1000, 0))
        age = max(0.0, time.time() - float(about["since"]))
        who = f"process {int(about['process'])} on {about['host']}, for {age:.0f} s"
    return (
        f"{directory}: another save into it is running ({who}); expected one at a time; wait for "
        "it to end, or save to another directory"
    )
