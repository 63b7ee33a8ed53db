"""The header of a safetensors file, checked before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from flax_tied_lora._peft.files import safetensors_format as formats
from flax_tied_lora._peft.files.errors import AdapterFileError

AGAIN = "the file is damaged or cut short; save it again, or copy it again"
# The first bytes of files that often have the name of a safetensors file, and are none.
_OTHER_FORMATS = {
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself with git lfs pull"),
    b"PK\x03\x04": ("a zip archive, as torch.save writes it", "save it as safetensors"),
    b"\x80": ("a pickle", "save it as safetensors"),
    b"<": ("a web page", "download the file again"),
}


def header_length(path: Path, file: IO[bytes], size: int) -> int:
    """Returns the length that a file announces for its header, if the file can hold it."""
    start = bytearray(32)
    del start[read_into(file, memoryview(start)) :]
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and length <= min(size - 8, formats.MAX_HEADER):
        return length
    for begin, (what, remedy) in _OTHER_FORMATS.items():
        if start.startswith(begin):
            raise AdapterFileError(f"{path}: found {what}; expected a safetensors file; {remedy}")
    if len(start) < 8:
        raise AdapterFileError(
            f"{path}: found {len(start)} bytes; expected a safetensors file, which has 8 and more; "
            f"{AGAIN}"
        )
    raise AdapterFileError(
        f"{path}: found a header of {length} bytes announced in a file of {size} bytes; expected "
        f"one that fits, and at most {formats.MAX_HEADER} bytes; {AGAIN}, or it is no safetensors "
        "file"
    )


def judge_by_the_library(path: Path, size: int) -> None:
    """Raises an `AdapterFileError` for a file that the safetensors library does not accept."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        reason = str(error)[:200]
        raise AdapterFileError(
            f"{path}: found no valid safetensors header in {size} bytes: {reason}; expected one "
            f"that describes every byte of the file once; {AGAIN}"
        ) from error


def read_into(file: IO[bytes], buffer: memoryview) -> int:
    """Fills a buffer as far as the file goes, and returns how far that is."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            break
        done += count
    return done
