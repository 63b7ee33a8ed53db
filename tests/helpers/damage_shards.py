"""Damaged adapters with shards; importing this adds them to the `CASES` of damage_cases.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.damage import INDEX, SHARDS, WEIGHTS
from tests.helpers.damage_cases import CASES, case


def _edit_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    changed = change(index["weight_map"])
    if changed is not None:
        index["weight_map"] = changed
    (directory / INDEX).write_text(json.dumps(index))


@case("found both adapter_model.safetensors and .*index.json; expected one of them", sharded=True)
def index_beside_a_single_file(directory: Path) -> None:
    shutil.copy(directory / SHARDS[0], directory / WEIGHTS)


@case(f"{SHARDS[1]}: found nothing, or something that is no file", sharded=True)
def index_missing_shard(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()


@case(f"{SHARDS[1]}: found no valid safetensors header", sharded=True)
def shard_cut_short(directory: Path) -> None:
    data = (directory / SHARDS[1]).read_bytes()
    (directory / SHARDS[1]).write_bytes(data[:-4])


@case(rf"{INDEX}: found tensor 'nowhere' in {INDEX} and not in {SHARDS[0]}", sharded=True)
def index_names_a_tensor_that_is_not_there(directory: Path) -> None:
    _edit_index(directory, lambda m: m.update(nowhere=SHARDS[0]))


@case(rf"{INDEX}: found tensor '.*' in {SHARDS[0]} and not in {INDEX}", sharded=True)
def index_leaves_a_tensor_out(directory: Path) -> None:
    _edit_index(directory, lambda m: {n: f for i, (n, f) in enumerate(sorted(m.items())) if i})


@case(rf"{SHARDS[1]}: found tensor '.*', which {SHARDS[0]} holds too", sharded=True)
def tensor_in_two_shards(directory: Path) -> None:
    shutil.copy(directory / SHARDS[0], directory / SHARDS[1])


@case(f"{INDEX}: found no object under 'weight_map'", sharded=True)
def index_without_map(directory: Path) -> None:
    (directory / INDEX).write_text("{}")


@case(f"{INDEX}: found no object under 'weight_map'", sharded=True)
def index_map_is_a_list(directory: Path) -> None:
    _edit_index(directory, list)


@case(f"{INDEX}: found no valid JSON", sharded=True)
def index_no_json(directory: Path) -> None:
    (directory / INDEX).write_text("weights")


@case(f"{INDEX}: found 3 as the file of tensor", sharded=True)
def index_file_is_a_number(directory: Path) -> None:
    _edit_index(directory, lambda m: dict.fromkeys(m, 3))


@case(f"{SHARDS[0]}: found a link to .*elsewhere.*; expected a file in the same", sharded=True)
def shard_links_out_of_the_directory(directory: Path) -> None:
    elsewhere = directory.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.move(directory / SHARDS[0], elsewhere / "private.safetensors")
    (directory / SHARDS[0]).symlink_to(elsewhere / "private.safetensors")


def _escape(name: str, file: str) -> None:
    @case(f"{INDEX}: found '.* as the file of tensor .*; expected the name of a", sharded=True)
    def do(directory: Path) -> None:
        target = directory / file
        # Where there can be such a file there is one, so that nothing but the name is wrong.
        with contextlib.suppress(OSError, ValueError):
            shutil.copy(directory / SHARDS[0], target)
        _edit_index(directory, lambda m: {n: f.replace(SHARDS[0], file) for n, f in m.items()})

    CASES[-1] = dataclasses.replace(CASES[-1], name=f"shard_{name}")


_escape("above", "../above.safetensors")
_escape("absolute", "/absolute.safetensors.d/x.safetensors")
_escape("inside_a_folder", "inner/../" + SHARDS[1])
_escape("with_backslash", "..\\above.safetensors")
_escape("on_a_drive", "C:above.safetensors")
_escape("is_the_directory", ".")
_escape("is_the_parent", "..")
_escape("without_name", "")
_escape("with_nul", "a\0.safetensors")
_escape("with_long_name", "a" * 300 + ".safetensors")
_escape("is_a_pickle", "adapter_model.bin")
