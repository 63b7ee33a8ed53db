"""The safetensors format: element types, and the header.

A file is the header's length (8 bytes, little-endian), the header (a JSON object, padded with
spaces to a multiple of 8), and the tensors' bytes without gaps. The header maps each name to
``{"dtype", "shape", "data_offsets": [from, to]}``, and ``__metadata__`` to a map of strings.
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

METADATA = "__metadata__"
# The largest header that the safetensors library reads, in bytes.
MAX_HEADER = 100_000_000
# NumPy 1 has 32 axes at most, and NumPy's index type 63 bits.
MAX_AXES, MAX_BYTES = 32, 2**63 - 1

# In reverse of the order in which the library lays tensors out. The widest come first in a file, so
# that every tensor starts at a multiple of its element's size.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: i for i, name in enumerate(DTYPES)}


def bytes_of(shape: Sequence[int], dtype: np.dtype) -> int:
    """Returns how many bytes a tensor takes."""
    return math.prod(shape) * dtype.itemsize


def can_be_array(shape: Sequence[int], dtype: np.dtype) -> bool:
    """Returns whether NumPy has arrays of this shape; it lacks even some empty ones."""
    nonzero = [size for size in shape if size]
    return len(shape) <= MAX_AXES and bytes_of(nonzero, dtype) <= MAX_BYTES


def layout_order(name: str, dtype: np.dtype) -> tuple[int, str]:
    """Returns a key that sorts tensors into the order of their bytes."""
    return -_ORDER[NAMES[dtype]], name


def header(
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> bytes:
    """Returns the start of a file: the length, the header and its padding."""
    entries: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, shape, dtype in tensors:
        end = start + bytes_of(shape, dtype)
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
