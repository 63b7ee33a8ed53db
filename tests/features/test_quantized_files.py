"""Quantised params on their way into files, and compared with others: none of it sees integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora import QuantizedArray, arithmetic, checkpoint
from flax_tied_lora.names import names_of, to_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter, save_merged
from tests.helpers import quantized_model
from tests.helpers.oracle import array, perturbed

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def plain():
    return {
        "transformer": {
            "wte": {"embedding": array(48, 32)},
            "h": {"0": {"mlp": {"c_fc": {"kernel": array(64, 32, seed=1), "bias": array(64)}}}},
            "h_1": {"kernel": array(32, 32, seed=2)},
        }
    }


def gpt2():
    """Params of which each leaf has a name in PyTorch, stored quantised, and adapted."""
    params = plain()
    del params["transformer"]["h_1"]
    stored = tied_lora.quantize(params, "nf4", block_size=16)
    adapted = tied_lora.wrap(stored, tied_lora.LoraConfig(r=2, target_modules=["wte"]))
    return stored, perturbed(adapted)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("target", [False, True])
def test_full_params_come_back_as_they_were_stored(tmp_path, target):
    stored = tied_lora.quantize(plain(), "nf4", block_size=16)
    table = stored["transformer"]["wte"]["embedding"]
    stored["lm_head"] = {"embedding": table, "kernel": table.T}
    np.testing.assert_array_equal(table.T.dequantize(), table.dequantize().T)
    ties = [("transformer/wte/embedding", "lm_head/kernel")]
    checkpoint.save_params(tmp_path / "params", stored, ties=ties)
    given = jax.eval_shape(lambda: stored) if target else None
    restored = checkpoint.restore_params(tmp_path / "params", given, sharding=SHARDING)
    assert_same(restored, stored)
    assert restored["lm_head"]["embedding"] is restored["transformer"]["wte"]["embedding"]


def test_fingerprint_knows_scales_and_how_it_is_quantised(tmp_path):
    stored, adapted = gpt2()
    checkpoint.save(tmp_path / "adapters", adapted)
    checkpoint.restore(tmp_path / "adapters", stored)
    wider = tied_lora.quantize(jax.tree.map(lambda x: 2 * x, tied_lora.dequantize(stored)), "nf4",
                               block_size=16)  # fmt: skip
    np.testing.assert_array_equal(
        wider["transformer"]["wte"]["embedding"].values,
        stored["transformer"]["wte"]["embedding"].values,
    )
    wider["transformer"]["h"]["0"]["mlp"]["c_fc"]["bias"] = (
        stored["transformer"]["h"]["0"]["mlp"]["c_fc"]["bias"]
    )  # fmt: skip
    with pytest.raises(ValueError, match="'transformer/wte/embedding' has other values"):
        checkpoint.restore(tmp_path / "adapters", wider)
    other = tied_lora.quantize(tied_lora.dequantize(stored), "int4", block_size=16)
    with pytest.raises(ValueError, match=r"is float32 as int4, blocks of 16, \[48, 32\], saved"):
        checkpoint.restore(tmp_path / "adapters", other)


def test_merged_model_and_state_dict_are_those_of_the_dequantised(tmp_path):
    stored, adapted = gpt2()
    names = names_of("gpt2")
    config = {"model_type": "gpt2", "vocab_size": 48, "n_embd": 32}
    for name, given, expected in (
        ("adapted", adapted, tied_lora.merge(adapted)),
        ("stored", stored, tied_lora.dequantize(stored)),
    ):
        save_merged(tmp_path / name, given, names, config=config)
        found = load_file(tmp_path / name / "model.safetensors")
        wanted = to_state_dict(expected, names)
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            np.testing.assert_allclose(tensor, wanted[key], rtol=1e-5, atol=1e-6)
    found = to_state_dict(stored, names)
    jax.tree.map(np.testing.assert_array_equal, found, to_state_dict(expected, names))


def test_adapter_file_with_the_base_embedding(tmp_path):
    stored, adapted = gpt2()
    names = names_of("gpt2")
    save_adapter(tmp_path, adapted, names, save_embedding_layers=True)
    (key,) = (k for k in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in k)
    found = load_file(tmp_path / "adapter_model.safetensors")[key]
    table = stored["transformer"]["wte"]["embedding"].dequantize()
    np.testing.assert_array_equal(found, table)

    def read(params, ids, x):
        rows = params["transformer"]["wte"]["embedding"]
        return rows[ids], x @ rows.T

    sites = tied_lora.trace(read, stored, jnp.int32(3), array(2, 32))
    loaded = load_adapter(tmp_path, stored, names, sites=sites)
    assert_same(loaded.adapters, adapted.adapters)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_difference_of_checkpoints_is_that_of_the_dequantised(which):
    params = plain()
    config = tied_lora.LoraConfig(r=2, target_modules=["h_1"])
    tuned = tied_lora.merge(perturbed(tied_lora.wrap(params, config), size=1.0))
    rest = {"exclude_modules": ["wte", "c_fc"]}
    pair = [params, tuned]
    pair[which == "tuned"] = tied_lora.quantize(pair[which == "tuned"], **rest)
    dense = [tied_lora.dequantize(x) for x in pair]
    found, expected = arithmetic.extract(*pair, config), arithmetic.extract(*dense, config)
    assert found.errors == pytest.approx(expected.errors, rel=1e-3)
    assert found.errors["transformer/h_1/kernel"] < 0.05
    assert isinstance(pair[which == "tuned"]["transformer"]["h_1"]["kernel"], QuantizedArray)


def test_vocabulary_is_not_grown_in_integers():
    stored, adapted = gpt2()
    for given in (stored, adapted):
        with pytest.raises(ValueError, match=r"'transformer/wte/embedding' is stored quantised"):
            tied_lora.grow_vocabulary(given, 50)
    kept = tied_lora.quantize(plain(), exclude_modules=["wte"])
    grown, _ = tied_lora.grow_vocabulary(kept, 50)
    assert grown["transformer"]["wte"]["embedding"].shape == (50, 32)
    assert isinstance(grown["transformer"]["h_1"]["kernel"], QuantizedArray)


def test_equal_values_are_found_where_they_are_quantised():
    table = array(48, 32)
    stored = tied_lora.quantize({"a": {"embedding": table}, "b": {"embedding": jnp.copy(table)}})
    (group,) = tied_lora.find_ties(stored, equal_values=True)
    assert group.paths == ("a/embedding", "b/embedding")
    other = tied_lora.quantize({"a": {"embedding": table}, "b": {"embedding": table + 1}})
    assert not tied_lora.find_ties(other, equal_values=True)


def test_checkpoint_of_adapters_knows_its_quantised_base(tmp_path):
    stored = tied_lora.quantize(quantized_model.PARAMS, block_size=16)
    adapted = quantized_model.wrapped(stored)
    checkpoint.save(tmp_path / "adapters", adapted)
    restored = checkpoint.restore(tmp_path / "adapters", stored).adapted
    jax.tree.map(np.testing.assert_array_equal, restored.adapters, adapted.adapters)
    other = tied_lora.quantize(
        jax.tree.map(lambda x: x + 0.1, quantized_model.PARAMS), block_size=16
    )
    with pytest.raises(ValueError, match="other values"):
        checkpoint.restore(tmp_path / "adapters", other)
