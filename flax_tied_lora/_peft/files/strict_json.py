"""JSON objects read from files that may hold anything.

Python's reader accepts more than JSON: NaN and Infinity pass, the last of two equal keys wins, and
deep nesting ends in RecursionError, in the reader or in whoever walks the result.
"""

from __future__ import annotations

import collections
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from flax_tied_lora._peft.files.errors import AdapterFileError, operating_system, shown

# PEFT's own configs have three levels.
MAX_DEPTH = 32
_AGAIN = "expected a JSON object; save the adapter again, or copy the file again"


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      AdapterFileError: the file cannot be read, is larger than ``most_bytes``, or is not one JSON
        object in UTF-8 with each key once, finite numbers and at most `MAX_DEPTH` levels.
    """
    return parse_object(read_bounded(path, most_bytes), path)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Returns the bytes of a regular file; see `read_object` for what is refused."""
    with operating_system(path, "read the file"):
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise AdapterFileError(
                f"{path}: found something that is no file; expected a regular file, or a link to "
                "one; save the adapter again"
            )
        with path.open("rb") as file:
            # Python allocates as much as is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, most_bytes) + 1)
    if len(data) > most_bytes:
        raise AdapterFileError(
            f"{path}: found more than {most_bytes} bytes; expected a few thousand of JSON; "
            "check that it is the right file"
        )
    return data


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """Returns the JSON object in bytes; ``path`` is for the errors of `read_object`."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_each_key_once,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{path}: found bytes that are not UTF-8 at {error.start}; {_AGAIN}"
        ) from error
    except RecursionError:
        raise AdapterFileError(f"{path}: found JSON nested too deeply; {_AGAIN}") from None
    except ValueError as error:
        raise AdapterFileError(f"{path}: found no valid JSON: {error}; {_AGAIN}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path}: found {_kind(value)}; {_AGAIN}")
    _check(value, path)
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return fields


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _check(value: dict[str, Any], path: Path) -> None:
    """Refuses nesting too deep to walk and text that cannot be printed."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for x in level:
            if isinstance(x, str):
                _check_text(x, path)
            elif isinstance(x, dict):
                inner += [*x.keys(), *x.values()]
            elif isinstance(x, list):
                inner += x
        level = inner
        if not level:
            return
    raise AdapterFileError(f"{path}: found JSON nested more than {MAX_DEPTH} levels; {_AGAIN}")


def _check_text(text: str, path: Path) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AdapterFileError(
            f"{path}: found half of a surrogate pair in the text {shown(text)}; {_AGAIN}"
        ) from error


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
