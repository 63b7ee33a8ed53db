"""`AdapterFileError`, and how values and names from files are shown in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_SHOWN = 80


class AdapterFileError(ValueError):
    """Files of an adapter cannot be read or written as asked; no file was changed."""

    __module__ = "flax_tied_lora.peft"


@contextlib.contextmanager
def operating_system(path: Path, doing: str) -> Iterator[None]:
    """Turns an error of the operating system into an `AdapterFileError` that names the path."""
    try:
        yield
    except AdapterFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no system takes
        reason = getattr(error, "strerror", None) or str(error)
        raise AdapterFileError(
            f"{path}: cannot {doing}: {reason} ({type(error).__name__}); expected a file system "
            "that allows it: check the path, its permissions and the space that is left"
        ) from error


def shown(value: object) -> str:
    """Returns a value from a file as an error may show it: on one line, not too long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def listed(names: list[str], most: int = 4) -> str:
    """Returns names from a file as an error may show them, the first few of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + rest
