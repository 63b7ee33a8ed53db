"""`CheckpointError`, and how other errors become one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read as asked; nothing was changed."""

    __module__ = "flax_tied_lora.checkpoint"


@contextlib.contextmanager
def explained(what: str, path: Any, remedy: str = "") -> Iterator[None]:
    """Turns any error inside into a `CheckpointError` that says ``what``, the path and a remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).split("[tensorstore_spec")[0].split("See full TensorStore")[0]
        message = f"{what} {path}: {type(error).__name__}: {reason[:500].strip()}"
        raise CheckpointError(f"{message}; {remedy}" if remedy else message) from error
