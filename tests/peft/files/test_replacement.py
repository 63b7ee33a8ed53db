"""A save replaces all of an adapter or nothing, whatever goes wrong and whenever."""

from __future__ import annotations

import json
import os
import stat
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from flax_tied_lora._peft.adapter import folder as files
from flax_tied_lora._peft.adapter.folder import AdapterFileError, read_adapter, write_adapter
from flax_tied_lora._peft.files import replacement
from flax_tied_lora._peft.files.safetensors_write import write_safetensors
from tests.helpers import sample_adapter as sample
from tests.helpers.damage import CONFIG, INDEX, WEIGHTS, reshard, snapshot
from tests.helpers.sample_adapter import (
    FOREIGN,
    OTHER_TEXT,
    TEXT,
    foreign,
    found,
    sources,
    tensors,
    write,
)


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    sample.save(directory)
    for name, data in FOREIGN.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize("text", [TEXT, OTHER_TEXT], ids=["same config", "other config"])
@pytest.mark.parametrize("most", [None, 64], ids=["to one file", "to shards"])
@pytest.mark.parametrize("sharded", [False, True], ids=["from one file", "from shards"])
def test_all_is_replaced_and_other_files_stay(adapter, text, most, sharded):
    if sharded:
        reshard(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    write(adapter, text, max_shard_size=most)
    assert found(adapter) == (json.loads(text)["lora_alpha"], 1)
    assert foreign(adapter) == FOREIGN
    ours = set(snapshot(adapter)) - set(FOREIGN)
    if most is None:
        assert ours == {CONFIG, WEIGHTS}
    else:
        shards = {n for n in ours if n.startswith("adapter_model-")}
        assert len(shards) > 2
        assert ours == {CONFIG, INDEX, *shards}


@pytest.mark.parametrize("sharded", [False, True])
def test_replacing_has_to_be_asked_for(adapter, sharded):
    if sharded:
        reshard(adapter)
    before = snapshot(adapter)
    message = "found 'adapter_config.json', .*; expected none of these to be there; pass overwrite"
    with pytest.raises(AdapterFileError, match=message):
        write(adapter, overwrite=False)
    assert snapshot(adapter) == before
    for path in adapter.glob("adapter_*"):
        path.unlink()
    write(adapter, overwrite=False)
    assert found(adapter) == (16, 1)
    assert foreign(adapter) == FOREIGN


def test_makes_directories(tmp_path):
    write(tmp_path / "a" / "b" / "c", overwrite=False)
    assert found(tmp_path / "a" / "b" / "c") == (16, 1)


def test_readme(tmp_path, adapter):
    write(tmp_path / "new", readme="# An adapter é\n")
    assert (tmp_path / "new" / "README.md").read_text(encoding="utf-8") == "# An adapter é\n"
    assert found(tmp_path / "new") == (16, 1)
    write(adapter, readme="# An adapter\n")
    assert foreign(adapter) == FOREIGN
    assert found(adapter) == (16, 1)


def test_permissions_are_the_usual_ones(tmp_path):
    write(tmp_path / "new")
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()} == {usual}


def test_a_link_is_replaced_and_not_its_target(adapter, tmp_path):
    for name in (CONFIG, WEIGHTS):
        (adapter / name).rename(tmp_path / name)
        (adapter / name).symlink_to(tmp_path / name)
    before = (tmp_path / CONFIG).read_bytes(), (tmp_path / WEIGHTS).read_bytes()
    write(adapter, OTHER_TEXT)
    assert found(adapter) == (99, 1)
    assert ((tmp_path / CONFIG).read_bytes(), (tmp_path / WEIGHTS).read_bytes()) == before
    assert not (adapter / CONFIG).is_symlink()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX])
def test_a_directory_in_the_way(adapter, name):
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).mkdir()
    before = snapshot(adapter)
    with pytest.raises(AdapterFileError, match=f"{name}: found a directory; expected a file"):
        write(adapter)
    assert snapshot(adapter) == before


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterFileError, match="file: found a file; expected a directory, or noth"):
        write(tmp_path / "file")
    with pytest.raises(AdapterFileError, match="cannot make the directory: Not a directory"):
        write(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(AdapterFileError, match=r"cannot make the directory: .*embedded null"):
        write(tmp_path / "nul\0")


# Errors on the way


class Diverged(Exception):
    pass


@pytest.mark.parametrize("error", [Diverged("at step 7"), OSError("theirs"), KeyboardInterrupt()])
@pytest.mark.parametrize("most", [None, 64], ids=["one file", "shards"])
@pytest.mark.parametrize("there", [True, False], ids=["over an adapter", "new directory"])
def test_array_that_cannot_be_had(adapter, tmp_path, error, most, there):
    directory = adapter if there else tmp_path / "new" / "directory"
    before = snapshot(adapter)

    def get():
        raise error

    entries = sources(tensors(1))
    for i in range(len(entries)):
        bad = [*entries[:i], (*entries[i][:3], get), *entries[i + 1 :]]
        with pytest.raises(type(error)) as caught:
            write_adapter(directory, OTHER_TEXT, bad, max_shard_size=most, overwrite=True)
        assert caught.value is error
        assert snapshot(adapter) == before
        assert not (tmp_path / "new").exists()


def test_a_single_file_of_a_model_is_replaced_in_one_step(tmp_path, monkeypatch):
    replaced, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replaced.append(b) or real(a, b))
    for seed in (0, 1):
        write_safetensors(tmp_path, sources({"x": np.full(3, seed)}), overwrite=True)
        assert load_file(tmp_path / "model.safetensors")["x"][0] == seed
    assert replaced == [tmp_path / "model.safetensors"] * 2


ORDERS = {
    # Two files and the directory that they are in; then the directory that this one is in.
    "at once": "fsync fsync fsync exchange fsync",
    # Two files; the note, its name; the config goes; the weights go and come; the config comes.
    "one by one": (
        "fsync fsync fsync exchange "
        "fsync replace fsync replace fsync replace replace fsync replace fsync"
    ),
}


@pytest.mark.parametrize("how", ORDERS)
def test_everything_is_on_the_disk_before_it_gets_its_name(adapter, monkeypatch, how):
    log = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: log.append(name) or real(*a))
    exchange = replacement.exchange
    monkeypatch.setattr(
        replacement, "exchange",
        lambda *a: log.append("exchange") or (how == "at once" and exchange(*a)),
    )  # fmt: skip
    write(adapter, OTHER_TEXT)
    assert " ".join(log) == ORDERS[how]


# Readers meanwhile


def test_reader_meets_a_save(adapter, monkeypatch):
    """A save between reading the config and opening the tensors: what is read belongs together."""
    real, saves = files.open_safetensors, []

    def open_after_a_save(*args):
        if len(saves) < most:
            saves.append(1)
            write(adapter, OTHER_TEXT if len(saves) % 2 else TEXT, seed=len(saves) % 2)
        return real(*args)

    monkeypatch.setattr(files, "open_safetensors", open_after_a_save)
    most = 1
    assert found(adapter) == (99, 1)
    write(adapter, TEXT)
    saves.clear()
    most = 99
    monkeypatch.setattr(files, "_TRIES", 3)
    message = f"{CONFIG}: found the file replaced while it was read, 3 times; expected it to stay"
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(adapter)
    assert len(saves) == 3


def test_reader_meets_a_save_and_finds_no_weights(adapter, monkeypatch):
    """Between the old weights and the new ones there are none; that is no damage."""
    real, saves = files.open_safetensors, []

    def open_during_a_save(*args):
        if saves:
            return real(*args)
        saves.append(1)
        write(adapter, OTHER_TEXT)
        raise AdapterFileError("found nothing")

    monkeypatch.setattr(files, "open_safetensors", open_during_a_save)
    assert found(adapter) == (99, 1)


def test_many_saves_and_many_readers(adapter):
    write(adapter, OTHER_TEXT)
    stop, seen, wrong = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                seen.add(found(adapter))
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(60):
        write(adapter, TEXT if i % 2 else OTHER_TEXT, seed=(i + 1) % 2)
    stop.set()
    thread.join()
    assert not wrong
    assert seen
    assert seen <= {(16, 0), (99, 1)}
