"""Damaged adapters, each with what its error has to say.

`CASES` work on a copy of any adapter that has two tensors of more than one element, in one
safetensors file.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.damage import CONFIG, WEIGHTS, parse, put, reshard, snapshot, unparse


@dataclasses.dataclass(frozen=True)
class Case:
    """One damage, and what its error says."""

    name: str
    do: Callable[[Path], None]
    message: str


CASES: list[Case] = []


def case(message: str, *, sharded: bool = False) -> Callable[[Callable[[Path], None]], Any]:
    """Adds a case: the function damages the directory it is given; with shards if so asked."""

    def register(do: Callable[[Path], None]) -> Callable[[Path], None]:
        def with_shards(directory: Path) -> None:
            reshard(directory)
            do(directory)

        name = do.__name__.strip("_")
        CASES.append(Case(name, with_shards if sharded else do, message))
        return do

    return register


def _config(name: str, content: str | bytes, message: str) -> None:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    message = f"{CONFIG}: found {message}"
    CASES.append(Case(name, lambda directory: (directory / CONFIG).write_bytes(raw), message))


def _lora(rest: str) -> str:
    return '{"peft_type": "LORA", ' + rest + "}"


_config("config_empty", "", "no valid JSON")
_config("config_no_json", "r: 8\nlora_alpha: 16\n", "no valid JSON: Expecting value")
_config("config_cut_short", '{"peft_type": "LORA", "r": 8', "no valid JSON: Expecting ','")
_config("config_two_objects", '{"peft_type": "LORA"}{}', "no valid JSON: Extra data")
_config("config_list", '["LORA"]', "a list; expected a JSON object")
_config("config_null", "null", "null; expected a JSON object")
_config("config_number", "8", "a number; expected a JSON object")
_config("config_string", '"LORA"', "a string; expected a JSON object")
_config("config_not_utf8", _lora('"revision": "é"').encode("latin-1"), "bytes that are not UTF-8")
_config("config_utf16", _lora('"r": 8').encode("utf-16"), "bytes that are not UTF-8")
_config("config_byte_order_mark", "\ufeff" + _lora('"r": 8'), "no valid JSON: .*BOM")
_config("config_binary", bytes(range(256)), "bytes that are not UTF-8|no valid JSON")
_config("config_huge", " " * 10_000_001, "more than 10000000 bytes; expected a few thousand")
_config("config_deep", '{"a":' * 100_000, "JSON nested too deeply")
_config("config_deep_lists", _lora('"a": ' + "[" * 50 + "]" * 50), "JSON nested more than 32")
_config("config_key_twice", _lora('"r": 8, "r": 16'), "no valid JSON: the key 'r' stands twice")
_config("config_inner_key_twice", _lora('"a": {"b": 1, "b": 1}'), ".*the key 'b' stands twice")
_config("config_nan", _lora('"lora_alpha": NaN'), "no valid JSON: NaN is no number")
_config("config_infinity", _lora('"lora_alpha": -Infinity'), "no valid JSON: -Infinity is no")
_config("config_too_large", _lora('"lora_alpha": 1e999'), ".*the number '1e999' is too large")
_config("config_endless_int", _lora(f'"r": {"9" * 5000}'), "no valid JSON: Exceeds the limit")
_config("config_surrogate", _lora(r'"revision": "\ud800"'), "half of a surrogate pair")
_config("config_surrogate_key", _lora(r'"\ud800": 1'), "half of a surrogate pair")
_config("config_no_method", '{"r": 8}', "no peft_type; expected 'LORA'")
_config("config_method_null", '{"peft_type": null}', "peft_type None; expected 'LORA'")
_config("config_method_list", '{"peft_type": ["LORA"]}', r"peft_type \['LORA'\]; expected 'LORA'")
for _method in ("IA3", "LOHA", "LOKR", "ADALORA", "PREFIX_TUNING", "lora"):
    _found = f"peft_type '{_method}'; expected 'LORA', the only one of PEFT's methods"
    _config(f"config_{_method}_method", json.dumps({"peft_type": _method, "r": 8}), _found)


@case(rf"found ('README.md', )?'{WEIGHTS}'; expected {CONFIG} among them; save the adapter again")
def no_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


@case(f"{CONFIG}: found something that is no file")
def config_is_a_directory(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / CONFIG).mkdir()


@case(rf"found ('README.md', )?'{CONFIG}'; expected {WEIGHTS} among them")
def no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


@case(f"{WEIGHTS}: found nothing, or something that is no file")
def weights_are_a_directory(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


@case("found no files; expected adapter_config.json")
def empty_directory(directory: Path) -> None:
    put({}, directory)


@case(": found nothing; expected the directory of an adapter")
def no_directory(directory: Path) -> None:
    shutil.rmtree(directory)


@case(": found a file; expected the directory of an adapter")
def file_in_place_of_the_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_bytes(b"")


@case(r"there are adapters in 'other': pass one of these directories")
def adapter_one_level_down(directory: Path) -> None:
    files = snapshot(directory)
    put({}, directory)
    put(files, directory / "other")


@case(r"adapter_model.bin: found a pickle, .* expected adapter_model.safetensors; .*save_file")
def pickle_in_place_of_safetensors(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


@case(f"{WEIGHTS}: found a pickle; expected a safetensors file; save it as safetensors")
def pickle_under_the_name_of_safetensors(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR." + b"\0" * 99)


@case(f"{WEIGHTS}: found a zip archive, as torch.save writes it; expected a safetensors")
def torch_archive_under_the_name_of_safetensors(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"PK\x03\x04" + b"\0\0\x08\x08" * 99)


@case(f"{WEIGHTS}: found a Git LFS pointer; .*git lfs pull")
def git_lfs_pointer(directory: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
    (directory / WEIGHTS).write_text(text)


@case(f"{WEIGHTS}: found a web page; .*download the file again")
def web_page(directory: Path) -> None:
    (directory / WEIGHTS).write_text("<!doctype html><title>Not found</title>")


def _weights(name: str, change: Callable[[bytes], bytes], message: str) -> None:
    def do(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        changed = change(data)
        assert changed != data
        (directory / WEIGHTS).write_bytes(changed)

    CASES.append(Case(name, do, f"{WEIGHTS}: found {message}"))


def _length(n: int) -> Callable[[bytes], bytes]:
    return lambda data: n.to_bytes(8, "little") + data[8:]


_INVALID = "no valid safetensors header in .*"
_weights("weights_empty", lambda d: b"", "0 bytes; expected a safetensors file, which has 8")
_weights("weights_five_bytes", lambda d: d[:5], "5 bytes; expected a safetensors file")
_weights("weights_cut_in_the_header", lambda d: d[:40], "a header of .* in a file of 40 bytes")
_weights("weights_cut_in_the_data", lambda d: d[:-8], _INVALID + "file not fully covered")
_weights("weights_one_byte_short", lambda d: d[:-1], _INVALID + "file not fully covered")
_weights("weights_longer", lambda d: d + b"\0", _INVALID + "file not fully covered")
_weights("header_past_the_end", lambda d: _length(len(d))(d), "a header of .* bytes announced")
_weights("header_absurd", _length(2**63), "a header of 9223372036854775808 bytes announced")
_weights("header_all_ones", _length(2**64 - 1), "a header of .* announced")
_weights("header_of_nothing", _length(0), _INVALID)
_weights("header_too_short", lambda d: _length(9)(d), _INVALID + "invalid JSON")
_weights("header_no_json", lambda d: unparse("tensors", parse(d)[1]), _INVALID)
_weights("header_list", lambda d: unparse([], parse(d)[1]), _INVALID)
_weights("header_deep", lambda d: unparse('{"x":' * 100_000, parse(d)[1]), _INVALID)
_weights("header_not_utf8", lambda d: d[:9] + b"\xff" + d[10:], _INVALID)
_weights("header_metadata_list", lambda d: unparse(parse(d)[0] | {"__metadata__": []}, parse(d)[1]),
         _INVALID)  # fmt: skip
_weights("header_metadata_numbers",
         lambda d: unparse(parse(d)[0] | {"__metadata__": {"step": 3}}, parse(d)[1]),
         _INVALID + "expected a string")  # fmt: skip


def _entry(name: str, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Adds a case that changes what the header says of the tensor that stands first."""

    def edit(data: bytes) -> bytes:
        header, body = parse(data)
        first = next(n for n, e in header.items() if n != "__metadata__")
        header[first] = change(header[first])
        return unparse(header, body)

    _weights(name, edit, message)


_entry("dtype_unknown", lambda e: e | {"dtype": "float32"}, _INVALID + "unknown variant")
_entry("dtype_no_text", lambda e: e | {"dtype": 32}, _INVALID)
_entry("dtype_of_other_width", lambda e: e | {"dtype": "U8" if e["dtype"] != "U8" else "F64"},
       _INVALID)  # fmt: skip
_entry("shape_negative", lambda e: e | {"shape": [-1, *e["shape"]]}, _INVALID + "integer `-1`")
_entry("shape_larger", lambda e: e | {"shape": [2, *e["shape"]]}, _INVALID)
_entry("shape_absurd", lambda e: e | {"shape": [2**62, 2**62]}, _INVALID + "overflow")
_entry("shape_fraction", lambda e: e | {"shape": [1.5]}, _INVALID)
_entry("shape_no_list", lambda e: e | {"shape": 8}, _INVALID)
_entry("shape_of_a_hundred_axes", lambda e: e | {"shape": [1] * 100 + e["shape"]},
       "tensor .* of 10. axes and shape .*; expected a shape that an array can have")  # fmt: skip
_entry("offsets_past_the_end", lambda e: e | {"data_offsets": [0, 2**40]}, _INVALID)
_entry("offsets_turned", lambda e: e | {"data_offsets": e["data_offsets"][::-1]}, _INVALID)
_entry("offsets_negative", lambda e: e | {"data_offsets": [-8, 0]}, _INVALID)
_entry("offsets_of_one", lambda e: e | {"data_offsets": [0]}, _INVALID)
_entry("entry_junk", lambda e: [[[{}]]], _INVALID)
_entry("entry_null", lambda e: None, _INVALID)
_entry("entry_without_shape", lambda e: {k: e[k] for k in e if k != "shape"}, _INVALID)
_entry("entry_as_a_list", lambda e: list(e.values()), ".* for tensor .*; expected an object")
_entry("dtype_of_four_bits",
       lambda e: e | {"dtype": "F4", "shape": [2 * (e["data_offsets"][1] - e["data_offsets"][0])]},
       "tensor .* of dtype 'F4'; expected one of BOOL")  # fmt: skip


def _two(change: Callable[[dict[str, Any], list[str], bytes], bytes]) -> Callable[[bytes], bytes]:
    """Returns a change that is told the names in the order of their bytes."""

    def edit(data: bytes) -> bytes:
        header, body = parse(data)
        entries = {n: e for n, e in header.items() if n != "__metadata__"}
        return change(entries, sorted(entries, key=lambda n: entries[n]["data_offsets"]), body)

    return edit


def _gap(entries: dict[str, Any], names: list[str], body: bytes) -> bytes:
    for name in names[1:]:
        entries[name]["data_offsets"] = [x + 16 for x in entries[name]["data_offsets"]]
    start = entries[names[0]]["data_offsets"][1]
    return unparse(entries, body[:start] + b"\0" * 16 + body[start:])


def _overlap(entries: dict[str, Any], names: list[str], body: bytes) -> bytes:
    for name in names[1:]:
        entries[name]["data_offsets"] = [x - 4 for x in entries[name]["data_offsets"]]
    return unparse(entries, body[:-4])


def _twice(entries: dict[str, Any], names: list[str], body: bytes) -> bytes:
    again = f"{json.dumps(names[0])}: {json.dumps(entries[names[0]])}"
    return unparse(f"{json.dumps(entries)[:-1]}, {again}}}", body)


def _left_out(entries: dict[str, Any], names: list[str], body: bytes) -> bytes:
    del entries[names[0]]
    return unparse(entries, body)


_weights("data_with_a_gap", _two(_gap), _INVALID + "invalid offset")
_weights("data_that_overlap", _two(_overlap), _INVALID + "invalid offset")
_weights("data_of_no_tensor", _two(_left_out), _INVALID + "invalid offset")
_weights("tensor_twice", _two(_twice), "no valid JSON: the key '.*' stands twice")
