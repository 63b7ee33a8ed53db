"""Merged models in files: what is stored, one tensor at a time, and what the config says.

`tests/against_torch/test_merged_export_torch.py` loads them in PyTorch, `test_export_errors.py` has
what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.merged import export as merged
from flax_tied_lora._peft.merged import leaves as merged_leaves
from flax_tied_lora._peft.merged.export import save_merged
from flax_tied_lora.names import names_of, to_state_dict
from tests.helpers.damage import snapshot
from tests.helpers.merged_models import (
    CONFIG,
    LLAMA,
    LLAMA_SHAPES,
    NAMES,
    OWN_CONFIG,
    SHAPES,
    gpt2,
    llama,
    random,
    tied_llama,
)
from tests.helpers.name_tables import draw, flat, own


def stored(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def config_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def assert_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, x in found.items():
        assert x.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


class TestTensors:
    def test_plain_params(self, tmp_path):
        save_merged(tmp_path, draw(), own(), OWN_CONFIG)
        assert_state(stored(tmp_path), to_state_dict(draw(), own()))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_dora": True, "bias": "all"},
            {"modules_to_save": ["wte", "ln_f"], "target_modules": ["c_attn"]},
            {"trainable_token_indices": {"wte": [2, 7]}},
            {"init_lora_weights": "pissa"},
        ],
        ids=lambda fields: "+".join(fields) or "lora",
    )
    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
    def test_they_are_those_of_merge(self, fields, dtype, tmp_path):
        adapted = gpt2(dtype, **fields)
        before = to_state_dict(adapted.params, NAMES)
        save_merged(tmp_path, adapted, NAMES, CONFIG)
        found = stored(tmp_path)
        assert_state(found, to_state_dict(tied_lora.merge(adapted), NAMES))
        changed = [n for n in found if not np.array_equal(found[n], before[n])]
        assert "transformer.wte.weight" in changed
        assert "lm_head.weight" not in found

    def test_slices_of_a_fused_leaf(self, tmp_path):
        """Of factors, rows, magnitudes and copies; never of a merged leaf."""
        paths = ["block_0/attn/kv", "experts/3/w", "block_0/attn/q/kernel", "embed/embedding"]
        equations = {
            "block_0/attn/kv": "bd,cdhk->cbhk",
            "experts/3/w": "bi,ieo->beo",
            "block_0/attn/q/kernel": "bd,dhk->bhk",
        }

        def reads(params):
            leaf = flat(params)
            total = leaf["embed/embedding"][jnp.arange(3)].sum()
            for path, equation in equations.items():
                first = equation.split(",")[0]
                rows = leaf[path].shape[equation.split(",")[1].split("->")[0].index(first[-1])]
                total += jnp.einsum(equation, jnp.ones((2, rows)), leaf[path]).sum()
            return total

        params = jax.tree.map(jnp.asarray, draw())
        sites = tied_lora.trace(reads, params)
        for fields in (
            {"target_modules": paths},
            {"target_modules": paths, "use_dora": True},
            {"target_modules": paths[2:], "modules_to_save": paths[:2]},
        ):
            config = tied_lora.LoraConfig(r=2, **fields)
            adapted = random(tied_lora.wrap(params, config, sites=sites))
            save_merged(tmp_path, adapted, own(), OWN_CONFIG, overwrite=True)
            expected = to_state_dict(tied_lora.merge(adapted), own())
            for name, x in stored(tmp_path).items():
                np.testing.assert_allclose(x, expected[name], rtol=2e-6, atol=2e-7, err_msg=name)

    def test_a_head_with_a_leaf_of_its_own_is_stored_once(self, tmp_path):
        adapted = llama()
        save_merged(tmp_path, adapted, names_of(LLAMA), LLAMA)
        found = stored(tmp_path)
        assert_state(found, to_state_dict(tied_lora.merge(adapted), names_of(LLAMA)))
        assert "lm_head.weight" not in found
        save_merged(tmp_path / "plain", tied_llama(), names_of(LLAMA), LLAMA)
        assert set(stored(tmp_path / "plain")) == set(found)

    def test_a_tied_table_without_adapters(self, tmp_path):
        adapted = llama(target_modules=["up_proj"])
        assert len(adapted.plan.groups) == 2
        save_merged(tmp_path, adapted, names_of(LLAMA), LLAMA)
        expected = draw(LLAMA_SHAPES)["model"]["embed_tokens"]["embedding"]
        np.testing.assert_array_equal(stored(tmp_path)["model.embed_tokens.weight"], expected)

    @pytest.mark.parametrize("target", ["a", "c"])
    def test_tied_leaves_that_are_two_tensors_in_pytorch(self, target, tmp_path):
        """Only what the names tie is stored once."""
        table = [("a/embedding", "a.weight"), ("b_{}/kernel", "b.{}.weight"), ("c/kernel", "c.w")]
        names = names_of(None, table)
        params = draw({"a/embedding": (9, 4), "b_0/kernel": (4, 9), "c/kernel": (4, 4)})
        config = tied_lora.LoraConfig(r=2, target_modules=[target])
        adapted = random(tied_lora.wrap(params, config, ties=[("a/embedding", "b_0/kernel")]))
        save_merged(tmp_path, adapted, names, {"model_type": "own"})
        assert_state(stored(tmp_path), to_state_dict(tied_lora.merge(adapted), names))
        assert len(stored(tmp_path)) == 3

    def test_boxes_states_and_shards(self, tmp_path):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        params = draw({**SHAPES, "transformer/wte/embedding": (16, 4)})
        config = CONFIG | {"vocab_size": 16}
        lora = tied_lora.LoraConfig(r=2, target_modules=["wte", "c_fc"])
        plain = random(tied_lora.wrap(params, lora))
        expected = to_state_dict(tied_lora.merge(plain), NAMES)

        where = NamedSharding(mesh, PartitionSpec("x"))
        table = params["transformer"]["wte"]["embedding"]
        sharded = {"transformer": {**params["transformer"], "wte": {
            "embedding": nn.Partitioned(jax.device_put(table, where), ("x", None))}}}  # fmt: skip
        for i, form in enumerate((sharded, nnx.State(params))):
            adapted = random(tied_lora.wrap(form, lora))
            save_merged(tmp_path / str(i), adapted, NAMES, config)
            for name, x in stored(tmp_path / str(i)).items():
                np.testing.assert_allclose(x, expected[name], rtol=1e-6, err_msg=name)

    def test_one_merged_tensor_at_a_time(self, tmp_path, monkeypatch):
        shapes = {f"transformer/h/{i}/mlp/c_fc/kernel": (64, 32) for i in range(12)}
        shapes["transformer/wte/embedding"] = (64, 32)
        params = jax.tree.map(jnp.asarray, draw(shapes))
        lora = tied_lora.LoraConfig(r=2, target_modules=["wte", "c_fc"], use_dora=True)
        adapted = random(tied_lora.wrap(params, lora))
        held, size = [], 64 * 32 * 4

        def write(directory, entries, **_):
            before = sum(x.nbytes for x in jax.live_arrays())
            for _, _, _, get in entries:
                array = get()
                held.append(sum(x.nbytes for x in jax.live_arrays()) - before)
                assert array.nbytes == size

        monkeypatch.setattr(merged, "write_safetensors", write)
        save_merged(tmp_path, adapted, NAMES, CONFIG | {"vocab_size": 64, "n_embd": 32})
        assert len(held) == 13
        assert max(held) < 1.5 * size


class TestDtype:
    def test_floating_point_tensors_are_cast(self, tmp_path):
        save_merged(tmp_path, gpt2(), NAMES, CONFIG, dtype=jnp.bfloat16)
        expected = to_state_dict(tied_lora.merge(gpt2()), NAMES)
        assert_state(stored(tmp_path), {n: x.astype(jnp.bfloat16) for n, x in expected.items()})
        assert config_in(tmp_path)["dtype"] == "bfloat16"

    def test_a_small_delta_is_kept_in_float32(self, tmp_path):
        adapted = gpt2(jnp.bfloat16)
        adapted = adapted.replace(adapters=jax.tree.map(lambda x: x * 1e-2, adapted.adapters))
        save_merged(tmp_path, adapted, NAMES, CONFIG, dtype="float32")
        merged_here = to_state_dict(tied_lora.merge(adapted, dtype=jnp.float32), NAMES)
        found = stored(tmp_path)
        assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(
            found["transformer.wte.weight"], merged_here["transformer.wte.weight"]
        )
        assert np.abs(found["transformer.wte.weight"] - stored_base(adapted)).max() > 0

    def test_integers_stay(self, tmp_path):
        params = {**draw(), "row": np.arange(4, dtype=np.int32)}
        save_merged(tmp_path, params, own(), OWN_CONFIG, dtype="float16")
        assert stored(tmp_path)["row.weight_row"].dtype == np.int32
        assert config_in(tmp_path)["dtype"] == "float16"

    def test_the_config_has_the_widest(self, tmp_path):
        params = draw(SHAPES, jnp.bfloat16)
        params["transformer"]["ln_f"]["scale"] = np.ones(4, np.float32)
        save_merged(tmp_path, params, NAMES, CONFIG | {"torch_dtype": "bfloat16"})
        config = config_in(tmp_path)
        assert config["torch_dtype"] == "float32"
        assert "dtype" not in config
        params["transformer"]["ln_f"]["scale"] = np.ones(4, np.float16)
        save_merged(tmp_path, params, NAMES, CONFIG, overwrite=True)
        assert config_in(tmp_path)["dtype"] == "float32"


def stored_base(adapted: tied_lora.Adapted) -> np.ndarray:
    return np.asarray(tied_lora.base(adapted)["transformer"]["wte"]["embedding"], np.float32)


class TestFiles:
    def test_shards_and_their_index(self, tmp_path):
        save_merged(tmp_path, gpt2(), NAMES, CONFIG, max_shard_size=300)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2
        found = {n: x for file in files for n, x in load_file(tmp_path / file).items()}
        assert_state(found, to_state_dict(tied_lora.merge(gpt2()), NAMES))
        save_merged(tmp_path, gpt2(), NAMES, CONFIG, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    def test_a_model_that_is_there_stays_unless_told(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        save_merged(tmp_path, gpt2(), NAMES, CONFIG)
        before = snapshot(tmp_path)
        with pytest.raises(AdapterFileError, match="overwrite=True"):
            save_merged(tmp_path, gpt2(), NAMES, CONFIG, dtype="float16")
        assert snapshot(tmp_path) == before
        save_merged(tmp_path, gpt2(), NAMES, CONFIG, dtype="float16", overwrite=True)
        assert stored(tmp_path)["transformer.wte.weight"].dtype == np.float16
        assert (tmp_path / "tokenizer.json").read_text() == "{}"

    @pytest.mark.parametrize("there", [False, True], ids=["empty", "a model there"])
    def test_a_failure_half_way_leaves_everything_as_it_was(self, there, tmp_path, monkeypatch):
        directory = tmp_path / "model"
        if there:
            save_merged(directory, gpt2(), NAMES, CONFIG)
        before = snapshot(tmp_path)
        whole, calls = merged_leaves.Leaf.torch, []

        def torch(leaf, weight):
            calls.append(weight.name)
            if len(calls) == 4:
                raise MemoryError("no room")
            return whole(leaf, weight)

        monkeypatch.setattr(merged_leaves.Leaf, "torch", torch)
        with pytest.raises(MemoryError, match="no room"):
            save_merged(directory, gpt2(), NAMES, CONFIG, dtype="float16", overwrite=True)
        assert snapshot(tmp_path) == before
        assert directory.exists() is there

    def test_a_directory_with_an_adapter(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterFileError, match="load it on top of the merged weights"):
            save_merged(tmp_path, gpt2(), NAMES, CONFIG, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]
