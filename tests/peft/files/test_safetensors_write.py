"""Adapters and models written: the library's bytes, in one file or in shards, or an error."""

from __future__ import annotations

import json
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from flax_tied_lora._peft.adapter.folder import AdapterFileError, read_adapter, write_adapter
from flax_tied_lora._peft.files import safetensors_format as formats
from flax_tied_lora._peft.files import safetensors_write
from flax_tied_lora._peft.files.safetensors_read import open_safetensors
from flax_tied_lora._peft.files.safetensors_write import write_safetensors
from tests.helpers import sample_adapter as sample
from tests.helpers.damage import CONFIG, INDEX, WEIGHTS, equal, snapshot
from tests.helpers.sample_adapter import TEXT, sources, tensors


def write(directory, arrays, **kwargs):
    write_adapter(directory, TEXT, sources(arrays), **kwargs)


def test_writes_what_the_library_writes(tmp_path):
    sample.save(tmp_path / "theirs")
    write(tmp_path / "ours", dict(sorted(tensors().items())))
    assert snapshot(tmp_path / "ours") == snapshot(tmp_path / "theirs")
    assert equal(sample.values(read_adapter(tmp_path / "ours")), tensors())


@pytest.mark.parametrize("dtype", formats.DTYPES.values(), ids=str)
def test_dtypes(tmp_path, dtype):
    arrays = {"x": np.arange(10).reshape(2, 5).astype(dtype), "y": np.zeros((), dtype)}
    write(tmp_path, arrays)
    assert (tmp_path / WEIGHTS).read_bytes() == save(arrays, {"format": "pt"})
    assert equal(sample.values(read_adapter(tmp_path)), arrays)


def test_every_dtype_in_one_file_is_laid_out_as_by_the_library(tmp_path):
    arrays = {
        f"{i % 3}{dtype}": np.zeros(1 + i % 4, dtype)
        for dtype in formats.DTYPES.values()
        for i in range(5)
    }
    write(tmp_path, arrays, metadata={})
    assert (tmp_path / WEIGHTS).read_bytes() == save(arrays)


def test_names_of_all_kinds(tmp_path):
    names = [
        "",
        'quote"',
        "back\\slash",
        "tab\t",
        "\0nul",
        "é",
        "字",
        "\U0001f600",
        "\x7f",
        "/",
        "a" * 3000,
    ]
    arrays = {f"x{name}": np.ones(2, np.float32) for name in names}
    write(tmp_path, arrays, metadata={"note": "é\n"})
    assert (tmp_path / WEIGHTS).read_bytes() == save(arrays, {"note": "é\n"})
    assert equal(sample.values(read_adapter(tmp_path)), arrays)


def test_no_tensors(tmp_path):
    write(tmp_path, {})
    assert load_file(tmp_path / WEIGHTS) == {}
    assert sample.values(read_adapter(tmp_path)) == {}


def test_metadata(tmp_path):
    write(tmp_path, tensors(), metadata={"format": "pt", "step": "7"})
    with safe_open(tmp_path / WEIGHTS, "np") as f:
        assert f.metadata() == {"format": "pt", "step": "7"}


@pytest.mark.parametrize("part", [1, 50, 2**24])
def test_views_and_foreign_byte_orders_and_jax_arrays(tmp_path, monkeypatch, part):
    monkeypatch.setattr(safetensors_write, "_CHUNK", part)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": x.T,
        "strided": x[::2, ::3],
        "turned": x[::-1],
        "broadcast": np.broadcast_to(x[0], (3, 6)),
        "big endian": x.astype(">f4"),
        "big endian without axes": np.array(2.5, ">f8"),
        "big endian without elements": np.zeros((3, 0), ">f4"),
        "jax": jnp.asarray(x, jnp.bfloat16),
        "strided bfloat16": x.astype(ml_dtypes.bfloat16)[:, ::2],
        "frozen": jnp.asarray(x)[0],
    }
    write(tmp_path, arrays)
    found = sample.values(read_adapter(tmp_path))
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], np.asarray(x))
        assert found[name].dtype == np.asarray(x).dtype.newbyteorder("<")


def test_arrays_are_asked_for_one_at_a_time(tmp_path):
    size, count = 4_000_000, 12
    live = []

    def get(i):
        live.append(tracemalloc.get_traced_memory()[0])
        return np.full((1000, size // 4000), i, np.float32).T

    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        shape = (size // 4000, 1000)
        entries = [(str(i), shape, np.float32, lambda i=i: get(i)) for i in range(count)]
        write_adapter(tmp_path, TEXT, entries)
        _, peak = tracemalloc.get_traced_memory()
        assert max(live) - before < 0.5 * size
        assert peak - before < 2.5 * size
        tracemalloc.reset_peak()
        with read_adapter(tmp_path) as files:
            for i in range(count):
                first = int(files.tensors[str(i)][0, 0])
                assert first == i
        assert tracemalloc.get_traced_memory()[1] - before < 1.5 * size
    finally:
        tracemalloc.stop()


def test_tensors_may_come_from_a_generator(tmp_path):
    write_adapter(tmp_path, TEXT, (t for t in sources(tensors())))
    assert equal(sample.values(read_adapter(tmp_path)), tensors())


def test_there_and_back_again(tmp_path):
    sample.save(tmp_path / "a")
    with read_adapter(tmp_path / "a") as files:
        entries = [
            (n, files.tensors.shape(n), files.tensors.dtype(n), lambda n=n: files.tensors[n])
            for n in files.tensors
        ]
        text = json.dumps(files.config, indent=2)
        write_adapter(tmp_path / "b", text, entries)
        assert snapshot(tmp_path / "b") == snapshot(tmp_path / "a")
        # Onto the files that it is read from, too.
        write_adapter(tmp_path / "a", text, entries, overwrite=True)
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "a")


# Shards


def test_shards(tmp_path):
    arrays = {f"t{i}": np.full((4, 5), i, np.float32) for i in range(7)}
    write(tmp_path, arrays, max_shard_size=200)
    names = [f"adapter_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(snapshot(tmp_path)) == sorted([CONFIG, INDEX, *names])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 80}
    assert index["weight_map"] == {f"t{i}": names[i // 2] for i in range(7)}
    for name in names:
        held = {n: arrays[n] for n, f in index["weight_map"].items() if f == name}
        assert (tmp_path / name).read_bytes() == save(held, {"format": "pt"})
    assert equal(sample.values(read_adapter(tmp_path)), arrays)


@pytest.mark.parametrize("most", [1, 2, 79, 80, 81, 159, 160, 10**9, "1B", "0.1KB", "0.2KiB"])
def test_sizes_of_shards(tmp_path, most):
    arrays = {f"t{i}": np.full((4, 5), i, np.float32) for i in range(5)}
    write(tmp_path, arrays | {"large": np.zeros(1000, np.uint8)}, max_shard_size=most)
    bytes_of = {1: 1, "1B": 1, "0.1KB": 100, "0.2KiB": 204}.get(most, most)
    shards = list(tmp_path.glob("adapter_model*.safetensors"))
    for path in shards:
        held = load_file(path)
        assert sum(x.nbytes for x in held.values()) <= bytes_of or len(held) == 1
    assert len(shards) == {1: 6, 2: 6, 79: 6, 80: 6, 81: 6, 159: 6, 160: 4, 10**9: 1}.get(
        bytes_of, {100: 6, 204: 4}.get(bytes_of)
    )
    assert len(sample.values(read_adapter(tmp_path))) == 6


def test_a_tensor_too_large_has_its_own_file_and_ends_none(tmp_path):
    arrays = {"a": np.zeros(2, np.uint8), "large": np.zeros(99, np.uint8), "b": np.ones(2, np.int8)}
    write(tmp_path, arrays, max_shard_size=10)
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weight_map == {"large": names[0], "a": names[1], "b": names[1]}
    assert equal(sample.values(read_adapter(tmp_path)), arrays)


@pytest.mark.parametrize(
    "size", [0, -1, True, "5", "5 apples", "GB", "-1GB", "5iB", 1.5j, [], "0B"]
)
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match=r"max_shard_size=.*; expected an int above 0, or a text"):
        write(tmp_path / "a", tensors(), max_shard_size=size)
    assert not (tmp_path / "a").exists()


def test_model_in_shards(tmp_path):
    arrays = {f"t{i}": np.full(10, i, np.float32) for i in range(4)}
    texts = {"generation_config.json": "{}", "config.json": '{"tie_word_embeddings": true}'}
    write_safetensors(tmp_path, sources(arrays), max_shard_size=80, texts=texts)
    names = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors"]
    names += ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(snapshot(tmp_path)) == names
    with open_safetensors(tmp_path, "model") as found:
        assert equal(dict(found), arrays)
    write_safetensors(tmp_path, sources(arrays), texts=texts, overwrite=True)
    assert sorted(snapshot(tmp_path)) == [*names[:2], "model.safetensors"]
    with open_safetensors(tmp_path, "model") as found:
        assert equal(dict(found), arrays)


# What cannot be written


def spec(**changes):
    entry = {"name": "x", "shape": (2,), "dtype": np.float32, "get": lambda: np.ones(2, np.float32)}
    return tuple((entry | changes).values())


BAD = {
    "name_empty": ([spec(name="")], "found '' as a tensor's name; expected text"),
    "name_none": ([spec(name=None)], "found None as a tensor's name"),
    "name_of_metadata": ([spec(name="__metadata__")], "found '__metadata__' as a tensor's name"),
    "name_surrogate": ([spec(name="\ud800")], r"found '\\ud800' as a tensor's name"),
    "name_twice": ([spec(), spec()], "found two tensors named 'x'; expected each name once"),
    "dtype_complex": ([spec(dtype=np.complex64)], "found tensor 'x' of dtype complex64; expected"),
    "dtype_object": ([spec(dtype=object)], "found tensor 'x' of dtype object; expected one of"),
    "dtype_int4": ([spec(dtype=ml_dtypes.int4)], "found tensor 'x' of dtype int4; expected one of"),
    "shape_negative": ([spec(shape=(-1, 2))], r"found tensor 'x' of shape \(-1, 2\); expected siz"),
    "shape_absurd": ([spec(shape=(2**62, 2))], "found tensor 'x' of shape .*; expected sizes"),
    "shape_long": ([spec(shape=(1,) * 40)], "found tensor 'x' of shape .*; expected sizes"),
    "other_shape": ([spec(shape=(3,))], r"found float32\[2\] for .*'x'; expected float32\[3\], as"),
    "other_axes": ([spec(shape=(2, 1))], r"found float32\[2\] for tensor 'x'; expected float32\[2"),
    "other_dtype": ([spec(dtype=np.float16)], r"found float32\[2\] .*; expected float16\[2\], as"),
    "no_array": ([spec(get=lambda: None)], r"found object\[\] for tensor 'x'; expected float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("there", [False, True], ids=["new directory", "over an adapter"])
def test_tensors_that_cannot_be_written(tmp_path, case, there):
    if there:
        sample.save(tmp_path / "a")
    before = snapshot(tmp_path / "a") if there else None
    entries, message = BAD[case]
    good = sources({"good": np.ones(3)})
    with pytest.raises(AdapterFileError, match=rf"{WEIGHTS}: {message}"):
        write_adapter(tmp_path / "a", TEXT, [*good, *entries], overwrite=True)
    assert (tmp_path / "a").exists() == there
    assert not there or snapshot(tmp_path / "a") == before


@pytest.mark.parametrize("metadata", [{"step": 3}, {3: "step"}, {"a": None}, {"a": "\ud800"}])
def test_metadata_that_is_no_text(tmp_path, metadata):
    with pytest.raises(AdapterFileError, match=f"{WEIGHTS}: found metadata .*; expected strings"):
        write(tmp_path / "a", tensors(), metadata=metadata)
    assert not (tmp_path / "a").exists()


def test_header_that_nobody_would_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_HEADER", 300)
    message = r"found 7 tensors, whose header takes \d+ bytes; expected at most 300; write shards"
    with pytest.raises(AdapterFileError, match=message):
        write(tmp_path / "a", tensors())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("[]", "a list"),
        ('{"r": 8}', "no peft_type"),
        ('{"peft_type": "IA3"}', "peft_type 'IA3'"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "no valid JSON: NaN"),
        ('{"peft_type": "LORA", "a": "\ud800"}', "bytes that are not UTF-8"),
    ],
)
def test_config_that_could_not_be_read_again(tmp_path, text, message):
    with pytest.raises(AdapterFileError, match=f"{CONFIG}: found {message}"):
        write_adapter(tmp_path / "a", text, sources(tensors()))
    assert not (tmp_path / "a").exists()
