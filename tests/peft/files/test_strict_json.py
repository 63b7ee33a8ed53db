"""JSON objects from files that may hold anything: one object, each key once, finite numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.files.strict_json import MAX_DEPTH, parse_object, read_object

PATH = Path("adapter_config.json")


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_an_object_is_read(tmp_path):
    value = {"r": 8, "ü": [1.5, None, True, {"x": "y"}], "big": 2**70}
    (tmp_path / "f").write_text(json.dumps(value))
    assert read_object(tmp_path / "f", 1000) == value
    assert parse_object(nested(MAX_DEPTH - 1), PATH)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1]", "found a list"),
        (b'"r"', "found a string"),
        (b"null", "found null"),
        (b"true", "found a truth value"),
        (b"3", "found a number"),
        (b"", "found no valid JSON"),
        (b'{"r": 8', "found no valid JSON"),
        (b'{"r": 8} 3', "found no valid JSON"),
        (b'{"r": NaN}', "NaN is no number in JSON"),
        (b'{"r": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"r": 1e999}', "the number '1e999' is too large"),
        (b'{"a": {"r": 1, "r": 2}}', "the key 'r' stands twice"),
        (b'{"r": "\xff"}', "bytes that are not UTF-8 at 7"),
        (b'{"r": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (nested(MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        (nested(100_000), "nested too deeply"),
    ],
    ids=range(17),
)
def test_what_is_no_object(data, says):
    with pytest.raises(AdapterFileError, match=r"^adapter_config\.json: ") as error:
        parse_object(data, PATH)
    assert says in str(error.value)


def test_a_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "f").write_bytes(b'{"r": 8}')
    assert read_object(tmp_path / "f", 8) == {"r": 8}
    with pytest.raises(AdapterFileError, match="found more than 7 bytes"):
        read_object(tmp_path / "f", 7)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(AdapterFileError, match="found something that is no file"):
            read_object(tmp_path / name, 100)
    with pytest.raises(AdapterFileError, match="nowhere"):
        read_object(tmp_path / "nowhere", 100)
