"""GGUF files as models, beside the directories that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_file
import jax.numpy as jnp
import loading
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import small_llama

pytestmark = pytest.mark.usefixtures("standard_promotion")
HEADS, F32 = {"attn_q": 4, "attn_k": 2}, gguf.GGMLQuantizationType.F32
TOKENS = np.arange(12).reshape(2, 6)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the weights of a directory as llama.cpp's converter writes them."""
    found, stored = load_file(folder / "model.safetensors"), {}
    names = {f"{theirs}.weight": ours for ours, theirs in gguf_file._MODULES.items()}
    for layer in range(2):
        names |= {
            f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{ours}"
            for ours, theirs in gguf_file._OF_LAYER.items()
        }
    for name, weight in found.items():
        if heads := HEADS.get(names[name].split(".")[-1]):  # rotated pairs become neighbours
            halves = weight.reshape(heads, 2, -1, weight.shape[-1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        stored[f"{names[name]}.weight"] = np.ascontiguousarray(weight)
    return stored


def write(path: Path, stored: dict[str, np.ndarray], **changes: Any) -> Path:
    config, writer = small_llama.CONFIG, gguf.GGUFWriter(path, "llama")
    settings = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in {**settings, **changes}.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(small_llama.TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(small_llama.TOKENS) - 3))
    writer.add_token_merges([" ".join(pair) for pair in small_llama.MERGES])
    for name, weight in stored.items():
        writer.add_tensor(name, weight, raw_dtype=F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 24}])
def test_the_model_is_that_of_the_directory(tmp_path, changes):
    folder = small_llama.write(tmp_path / "model", **changes)
    keys = {"llama.attention.key_length": changes["head_dim"]} if "head_dim" in changes else {}
    path = write(tmp_path / "small.gguf", tensors(folder), **keys)
    expected, found = loading.load(folder), loading.load(path)
    assert found.config == expected.config
    np.testing.assert_allclose(found(TOKENS), expected(TOKENS), rtol=0, atol=1e-5)
    assert loading.load(path, jnp.bfloat16).output_matrix().dtype == jnp.bfloat16
    text = "The he-12 <|im_end|>"
    one, other = loading.tokenizer(path), loading.tokenizer(folder)
    assert one.decode(one(text)["input_ids"]) == other.decode(other(text)["input_ids"]) == text
    assert one.pad_token_id == one.eos_token_id == 2


def test_what_is_refused_is_named(tmp_path):
    whole = tensors(small_llama.write(tmp_path / "model"))
    name = "blk.1.attn_q.weight"
    without = {key: weight for key, weight in whole.items() if key != name}
    cases = [
        (without, {}, rf"small\.gguf has no tensor '{name}'"),
        (whole | {"rope_freqs.weight": np.ones(8, np.float32)}, {},
         r"small\.gguf: tensor 'rope_freqs\.weight' \[8\] has no place"),
        (whole, {"llama.rope.scaling.type": "yarn"}, r"small\.gguf scales positions \(yarn\)"),
        (whole | {name: whole[name][:32]}, {}, r"small\.gguf: .*q_proj\.weight is \[32, 64\]"),
    ]  # fmt: skip
    for stored, changes, message in cases:
        path = write(tmp_path / "small.gguf", stored, **changes)
        with pytest.raises(ValueError, match=message):
            loading.load(path)
