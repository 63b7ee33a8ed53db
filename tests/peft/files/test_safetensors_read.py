"""Adapters read: what the safetensors library wrote, and what the file system offers."""

from __future__ import annotations

import gc
import os
import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_tied_lora._peft.adapter.folder import AdapterFileError, read_adapter
from flax_tied_lora._peft.files import safetensors_format as formats
from flax_tied_lora._peft.files import safetensors_read
from tests.helpers import sample_adapter as sample
from tests.helpers.damage import (
    CONFIG,
    SHARDS,
    WEIGHTS,
    equal,
    reshard,
)


@pytest.fixture
def adapter(tmp_path):
    sample.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_reads_what_the_library_wrote(adapter):
    with read_adapter(str(adapter)) as files:
        assert files.directory == adapter
        assert files.config == sample.FIELDS
        expected = sample.tensors()
        assert {n: files.tensors.shape(n) for n in files.tensors} == {
            n: x.shape for n, x in expected.items()
        }
        assert {n: files.tensors.dtype(n) for n in files.tensors} == {
            n: x.dtype for n, x in expected.items()
        }
        assert equal(dict(files.tensors), expected)
        files.tensors.check_finite()


def test_reads_shards(adapter):
    reshard(adapter)
    with read_adapter(adapter) as files:
        assert repr(files.tensors) == "Tensors(7 of 2 files)"
        assert equal(dict(files.tensors), sample.tensors())


def test_arrays_are_the_callers_own(adapter):
    with read_adapter(adapter) as files:
        name = f"{sample.PREFIX}.v_proj.lora_B.weight"
        files.tensors[name][:] = 0
        np.testing.assert_array_equal(files.tensors[name], sample.tensors()[name])


@pytest.mark.parametrize("dtype", formats.DTYPES.values(), ids=str)
def test_dtypes(adapter, dtype):
    x = np.arange(12).reshape(3, 4).astype(dtype)
    save_file({"x": x}, adapter / WEIGHTS)
    with read_adapter(adapter) as files:
        assert files.tensors.dtype("x") == x.dtype
        assert equal(dict(files.tensors), {"x": x})


def test_nothing_is_read_before_it_is_asked_for(adapter, monkeypatch):
    read = []
    with read_adapter(adapter) as files:
        real = np.empty
        monkeypatch.setattr(np, "empty", lambda *a: read.append(a) or real(*a))
        assert {files.tensors.shape(n) for n in files.tensors}
        assert f"{sample.PREFIX}.q_proj.lora_A.weight" in files.tensors
        assert not read
        assert files.tensors["one"] == 3.5
        assert len(read) == 1


def test_names_that_are_not_there(adapter):
    with read_adapter(adapter) as files:
        for ask in (files.tensors.__getitem__, files.tensors.shape, files.tensors.dtype):
            with pytest.raises(KeyError, match="two"):
                ask("two")


def open_files():
    return len(os.listdir("/dev/fd"))


def test_files_are_closed(adapter):
    reshard(adapter)
    gc.collect()
    before = open_files()
    files = read_adapter(adapter)
    assert open_files() == before + 2
    files.tensors.close()
    files.tensors.close()
    assert open_files() == before
    assert files.tensors.shape("one") == ()
    with pytest.raises(ValueError, match="closed; read 'one' before closing it"):
        files.tensors["one"]
    read_adapter(adapter)
    gc.collect()
    assert open_files() == before
    (adapter / SHARDS[1]).unlink()
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(adapter)
    assert open_files() == before, caught


def test_reads_what_was_opened(adapter):
    with read_adapter(adapter) as files:
        shutil.move(adapter / WEIGHTS, adapter / "old")
        save_file({"other": np.ones(3)}, adapter / WEIGHTS)
        assert equal(dict(files.tensors), sample.tensors())


def test_file_replaced_while_its_header_is_read(adapter, monkeypatch):
    def replace(path, size):
        shutil.copy(path, adapter / "new")
        shutil.move(adapter / "new", path)

    monkeypatch.setattr(safetensors_read, "judge_by_the_library", replace)
    with pytest.raises(AdapterFileError, match=f"{WEIGHTS}: found the file replaced while it was"):
        read_adapter(adapter)


def test_file_cut_short_after_it_was_opened(adapter):
    with read_adapter(adapter) as files:
        os.truncate(adapter / WEIGHTS, (adapter / WEIGHTS).stat().st_size - 2)
        last = f"{sample.PREFIX}.q_proj.lora_A.weight"
        message = rf"{WEIGHTS}: found \d+ bytes of tensor '.*'; expected \d+; the file is damaged"
        with pytest.raises(AdapterFileError, match=message):
            dict(files.tensors)
        assert files.tensors.shape(last) == (2, 6)


def test_many_threads_read_one_file(adapter):
    save_file({str(i): np.full(2000, i) for i in range(64)}, adapter / WEIGHTS)
    wrong = []
    with read_adapter(adapter) as files:

        def read(start):
            for i in range(start, 64):
                if not (files.tensors[str(i)] == i).all():
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_nan_is_read_and_can_be_refused(adapter, bad, dtype):
    x = np.ones((3, 4)).astype(dtype)
    x[1, 2] = bad
    save_file({"good": np.ones(2, np.float32), "bad": x, "int": np.ones(3, int)}, adapter / WEIGHTS)
    with read_adapter(adapter) as files:
        assert equal({"bad": files.tensors["bad"]}, {"bad": x})
        with pytest.raises(AdapterFileError, match=f"{WEIGHTS}: found 1 of 12 values of .*'bad'"):
            files.tensors.check_finite()


def test_truth_values_are_0_and_1(adapter):
    save_file({"x": np.array([True, False, True])}, adapter / WEIGHTS)
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-1] + b"\x07")
    with (
        read_adapter(adapter) as files,
        pytest.raises(AdapterFileError, match="bytes above 1 in tensor 'x'"),
    ):
        files.tensors["x"]


def test_empty_tensors_that_numpy_has_not(adapter):
    x = np.zeros((0, 2), np.float32)
    save_file({"x": x}, adapter / WEIGHTS)
    data = (adapter / WEIGHTS).read_bytes().replace(b"[0,2]", b"[0,4611686018427387904]")
    text = data[8:].rstrip(b" ")
    (adapter / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterFileError, match=r"tensor 'x' of 2 axes and shape .*; expected a"):
        read_adapter(adapter)


def test_pickle_beside_safetensors_is_not_opened(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    assert equal(sample.values(read_adapter(adapter)), sample.tensors())


# Links


def test_links_to_files_are_followed(adapter, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(adapter / name)
    (tmp_path / "link").symlink_to(linked)
    assert equal(sample.values(read_adapter(tmp_path / "link")), sample.tensors())


def test_shards_in_hugging_faces_cache(adapter, tmp_path):
    reshard(adapter)
    blobs, snapshots = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshots.mkdir(parents=True)
    for path in adapter.iterdir():
        shutil.copy(path, blobs / f"sha-{path.name}")
        (snapshots / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert equal(sample.values(read_adapter(snapshots)), sample.tensors())
    (snapshots / SHARDS[0]).unlink()
    (snapshots / SHARDS[0]).symlink_to(adapter / SHARDS[0])
    with pytest.raises(AdapterFileError, match=f"{SHARDS[0]}: found a link to"):
        read_adapter(snapshots)
    (snapshots / SHARDS[0]).unlink()
    (snapshots / SHARDS[0]).symlink_to(f"../../blobs/sha-{SHARDS[0]}")
    shutil.move(tmp_path / "hub" / "snapshots", tmp_path / "hub" / "others")
    with pytest.raises(AdapterFileError, match=f"{SHARDS[0]}: found a link to"):
        read_adapter(tmp_path / "hub" / "others" / "abc")


def test_shard_may_be_a_link_within_the_directory(adapter):
    reshard(adapter)
    shutil.move(adapter / SHARDS[0], adapter / "data")
    (adapter / SHARDS[0]).symlink_to("data")
    assert equal(sample.values(read_adapter(adapter)), sample.tensors())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_pipes_and_dead_links_do_not_hang(adapter, name):
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(AdapterFileError, match=f"{name}: found .*no file"):
        read_adapter(adapter)
    (adapter / name).unlink()
    (adapter / name).symlink_to("nowhere")
    with pytest.raises(AdapterFileError, match=f"expected {name} among them"):
        read_adapter(adapter)


def test_link_that_leads_to_itself(adapter):
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises(AdapterFileError):
        read_adapter(adapter)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "gs://bucket/adapter", "user/adapter"])
def test_paths_that_are_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"found nothing; expected the directory|cannot read"
    ):
        read_adapter(path)
