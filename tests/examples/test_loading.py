"""Directories and GGUF files as models: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import loading
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import small_llama

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def folder(tmp_path):
    return small_llama.write(tmp_path / "small")


def changed(folder, **tensors):
    file = folder / "model.safetensors"
    found = load_file(file) | tensors
    save_file({name: x for name, x in found.items() if x is not None}, file)


def test_a_dtype(folder):
    model = loading.load(folder, jnp.bfloat16)
    assert model.model.norm.weight[...].dtype == jnp.bfloat16
    assert model.output_matrix().dtype == jnp.bfloat16


def test_a_weight_that_is_missing_or_of_another_shape(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(folder / "model.safetensors")[name]
    changed(folder, **{name: np.ones((3, 4), np.float32)})
    with pytest.raises(ValueError, match=rf"{name} is \[3, 4\], and the config says \[96, 64\]"):
        loading.load(folder)
    changed(folder, **{name: None})
    with pytest.raises(ValueError, match=rf"model\.safetensors has no tensor '{name}'"):
        loading.load(folder)
    changed(folder, **{name: whole})
    loading.load(folder)
    (folder / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        loading.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: No such file"):
        loading.load(folder)


def test_a_weight_that_the_model_has_no_place_for(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    changed(folder, **{name: np.ones(64, np.float32)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has no place in the model"):
        loading.load(folder)
    changed(folder, **{name: None, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)})
    loading.load(folder)


def test_a_head_of_its_own_beside_a_tie(folder):
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    changed(folder, **{"lm_head.weight": table})
    tied = loading.load(folder)  # a copy is no news
    changed(folder, **{"lm_head.weight": table + 1})
    with pytest.warns(UserWarning, match=r"lm_head\.weight, which is not .*: false") as found:
        other = loading.load(folder)
    assert [Path(warning.filename).name for warning in found] == ["test_loading.py"]
    np.testing.assert_array_equal(other.output_matrix(), tied.output_matrix())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(loading.load(folder).output_matrix(), table + 1)


def test_shards(folder):
    found = load_file(folder / "model.safetensors")
    expected = loading.load(folder)(np.arange(6)[None])
    names = sorted(found)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: found[name] for name in own}, folder / file)
    places = {name: file for file, own in parts.items() for name in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(loading.load(folder)(np.arange(6)[None]), expected)
    del places["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index\.json has no tensor 'model\.norm\.weight'"):
        loading.load(folder)


def test_a_config_that_is_none(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is a list: expected an object"):
        loading.config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        loading.config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"small has no config\.json: expected a directory"):
        loading.config(folder)


def test_no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="small has no tokenizer that transformers reads"):
        loading.tokenizer(folder)


def test_names(folder):
    config = loading.config(folder)
    names = loading.names(config)
    assert dict(names.tied) == {"model/embed_tokens/embedding": ("lm_head",)}
    (weight,) = names.to_torch("model/layers/1/self_attn/q_proj/kernel", 2)
    assert weight.name == "model.layers.1.self_attn.q_proj.weight"
    untied = loading.names(config | {"tie_word_embeddings": False})
    assert untied.to_torch("lm_head/kernel", 2)[0].name == "lm_head.weight"
