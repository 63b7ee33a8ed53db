"""`load_adapter` and `save_adapter` without PyTorch: files as PEFT and others write them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora.names import UnmappedError, names_of
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter
from tests.helpers.damage import CONFIG, WEIGHTS, reshard, snapshot
from tests.helpers.small_adapters import PREFIX, draw, factors, put, tied_factors

NAMES = names_of(
    None,
    [
        ("embed/embedding", "model.embed_tokens.weight"),
        ("q/kernel", "model.q_proj.weight"),
        ("head/kernel", "lm_head.weight"),
    ],
)
TIED_NAMES = names_of(
    None,
    [("embed/embedding", "model.embed_tokens.weight"), ("q/kernel", "model.q_proj.weight")],
    tied={"embed/embedding": ("lm_head",)},
)


def params() -> dict[str, Any]:
    table = jnp.asarray(draw(0, 12, 4))
    return {"embed": {"embedding": table}, "q": {"kernel": jnp.asarray(draw(1, 4, 4))}}


def model(p: Any, tokens: Any) -> Any:
    x = p["embed"]["embedding"][tokens] @ p["q"]["kernel"]
    return x @ p["embed"]["embedding"].T


TOKENS = np.array([3, 5, 11])
SITES = tied_lora.trace(model, params(), TOKENS)


def load(directory: Path, p: Any = None, names: Any = TIED_NAMES, **options: Any) -> Any:
    return load_adapter(directory, params() if p is None else p, names, sites=SITES, **options)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_narrower_factors_are_the_same_numbers(tmp_path, dtype):
    tensors = factors("model.q_proj", dtype=dtype)
    own = load(put(tmp_path, tensors)).adapters["lora"]["q/kernel"]
    a, b = tensors.values()
    assert own["lora_a"].dtype == own["lora_b"].dtype == np.float32
    np.testing.assert_array_equal(own["lora_a"], a.T.astype(np.float32))
    np.testing.assert_array_equal(own["lora_b"], b.T.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_saved_narrower(tmp_path, dtype):
    adapted = load(put(tmp_path / "a", factors("model.q_proj")))
    save_adapter(tmp_path / "b", adapted, TIED_NAMES, dtype=dtype)
    for name, x in load_file(tmp_path / "b" / WEIGHTS).items():
        assert x.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(x, factors("model.q_proj")[name].astype(x.dtype))


def test_shards(tmp_path):
    tensors = {**factors("model.q_proj"), **tied_factors()}
    whole = load(put(tmp_path, tensors, ensure_weight_tying=True))
    reshard(tmp_path)
    again = load(tmp_path)
    assert again.plan is whole.plan
    jax.tree.map(np.testing.assert_array_equal, again.adapters, whole.adapters)


def test_copies_of_a_tied_adapter(tmp_path):
    tensors = tied_factors()
    put(tmp_path, tensors, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted = load(tmp_path)
    assert list(adapted.adapters["lora"]) == ["embed/embedding"]
    np.testing.assert_array_equal(
        adapted.adapters["lora"]["embed/embedding"]["lora_a"],
        tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"].T,
    )

    tensors[f"{PREFIX}lm_head.lora_B.weight"] = draw(99, 12, 2)
    put(tmp_path, tensors, target_modules=["embed_tokens"], ensure_weight_tying=True)
    before = snapshot(tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"lm_head.lora_B.* differs from .*embedding_A"
    ) as caught:
        load(tmp_path)
    assert 'tied_copies="apart"' in str(caught.value)
    assert snapshot(tmp_path) == before

    with pytest.warns(tied_lora.WeightTyingWarning, match="an adapter of its own"):
        apart = load(tmp_path, tied_copies="apart")
    assert set(apart.adapters["lora"]) == {
        "embed/embedding:embed_tokens", "embed/embedding:lm_head",
    }  # fmt: skip
    head = apart.adapters["lora"]["embed/embedding:lm_head"]
    np.testing.assert_array_equal(head["lora_a"], draw(99, 12, 2))


def test_a_config_without_the_flag_means_false(tmp_path):
    put(tmp_path, tied_factors(), target_modules=["embed_tokens", "lm_head"])
    with pytest.warns(tied_lora.WeightTyingWarning, match="ensure_weight_tying=False"):
        adapted = load(tmp_path)
    assert adapted.plan.config.ensure_weight_tying is False
    assert len(adapted.adapters["lora"]) == 2


def test_without_sites_what_is_tied_is_not_known(tmp_path):
    put(tmp_path, tied_factors(), target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterFileError, match="sites=sites"):
        load_adapter(tmp_path, params(), TIED_NAMES)
    put(tmp_path, tied_factors(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted = load_adapter(tmp_path, params(), TIED_NAMES)
    assert list(adapted.adapters["lora"]) == ["embed/embedding"]


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_magnitudes_under_both_names(tmp_path, end):
    tensors = factors("model.q_proj") | {f"{PREFIX}model.q_proj.{end}": draw(40, 4)}
    adapted = load(put(tmp_path / "a", tensors, use_dora=True))
    own = adapted.adapters["lora"]["q/kernel"]
    np.testing.assert_array_equal(own["lora_magnitude"], draw(40, 4))
    save_adapter(tmp_path / "b", adapted, TIED_NAMES)
    assert f"{PREFIX}model.q_proj.lora_magnitude_vector" in load_file(tmp_path / "b" / WEIGHTS)


def test_base_embeddings(tmp_path):
    base = {f"{PREFIX}model.embed_tokens.weight": draw(0, 12, 4)}
    base[f"{PREFIX}lm_head.weight"] = draw(0, 12, 4)
    put(tmp_path, factors("model.q_proj") | base)
    assert set(load(tmp_path).adapters) == {"lora"}
    base[f"{PREFIX}lm_head.weight"] = draw(7, 12, 4)
    put(tmp_path, factors("model.q_proj") | base)
    with pytest.raises(AdapterFileError, match=r"lm_head.weight \[12, 4\] is the base's own"):
        load(tmp_path)
    assert set(load(tmp_path, base_embeddings="ignore").adapters) == {"lora"}
    base[f"{PREFIX}lm_head.weight"] = draw(0, 13, 4)
    put(tmp_path, factors("model.q_proj") | base)
    with pytest.raises(AdapterFileError, match=r"\[13, 4\] .*'embed/embedding' \[12, 4\] of the"):
        load(tmp_path)


def test_abstract_params(tmp_path):
    put(tmp_path, factors("model.q_proj") | tied_factors(), ensure_weight_tying=True,
        target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    shapes = jax.eval_shape(params)
    adapted = load(tmp_path, shapes)
    whole = load(tmp_path)
    assert adapted.plan is whole.plan
    jax.tree.map(np.testing.assert_array_equal, adapted.adapters, whole.adapters)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapted.params))


def test_frozen_params(tmp_path):
    put(tmp_path, factors("model.q_proj"))
    adapted = load(tmp_path, freeze(params()))
    assert set(adapted.adapters["lora"]) == {"q/kernel"}
    expected = tied_lora.adapt(model)(load(tmp_path), TOKENS)
    np.testing.assert_array_equal(tied_lora.adapt(model)(adapted, TOKENS), expected)


def test_sharded_params(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    place = NamedSharding(mesh, P("x", None))
    sharded = jax.tree.map(lambda x: jax.device_put(x, place), params())
    put(tmp_path, factors("model.q_proj") | tied_factors(), ensure_weight_tying=True,
        target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    adapted = load(tmp_path, sharded)
    table = adapted.adapters["lora"]["embed/embedding"]
    assert table["lora_a"].sharding.is_equivalent_to(place, 2)
    assert table["lora_b"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, adapted.adapters, load(tmp_path).adapters)
    save_adapter(tmp_path / "b", adapted, TIED_NAMES)
    expected = load_file(tmp_path / WEIGHTS)
    found = load_file(tmp_path / "b" / WEIGHTS)
    assert set(found) == set(expected)
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name])


def test_another_scaling(tmp_path):
    adapted = load(put(tmp_path / "a", factors("model.q_proj")))
    scaled = adapted.replace(scaling={"q/kernel": adapted.scaling["q/kernel"] * 1.5})
    save_adapter(tmp_path / "b", scaled, TIED_NAMES)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6.0, {})
    assert load(tmp_path / "b").scaling["q/kernel"] == 3.0


def test_wrong_arguments(tmp_path):
    put(tmp_path, factors("model.q_proj"))
    with pytest.raises(
        ValueError, match=r"tied_copies='both'; expected one of \('same', 'apart'\)"
    ):
        load(tmp_path, tied_copies="both")
    with pytest.raises(ValueError, match="base_embeddings='no'; expected one of"):
        load(tmp_path, base_embeddings="no")
    with pytest.raises(TypeError, match="names is a str; expected names_of"):
        load(tmp_path, names="gpt2")
    with pytest.raises(ValueError, match="nowhere") as caught:
        load(tmp_path, ties=[("embed/embedding", "nowhere")])
    assert not isinstance(caught.value, AdapterFileError)
    adapted = load(tmp_path)
    with pytest.raises(TypeError, match="is an Adapted; pass base"):
        load(tmp_path, adapted)
    with pytest.raises(TypeError, match="Adapted"):
        save_adapter(tmp_path / "b", params(), TIED_NAMES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="names is a dict; expected names_of"):
        save_adapter(tmp_path / "b", adapted, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(AdapterFileError, match="overwrite=True"):
        save_adapter(tmp_path, adapted, TIED_NAMES)
    assert not (tmp_path / "b").exists()


def test_a_leaf_without_a_name(tmp_path):
    adapted = tied_lora.wrap(params(), tied_lora.LoraConfig(r=2, target_modules=["q"]))
    names = names_of(None, [("embed/embedding", "model.embed_tokens.weight")])
    with pytest.raises(UnmappedError, match=r"'q/kernel'.*extra=\["):
        save_adapter(tmp_path / "b", adapted, names)
    assert not (tmp_path / "b").exists()


def test_factors_of_an_untraced_kernel_the_other_way_round(tmp_path):
    """Rows that are no inputs cannot be PEFT's lora_A: the error asks for call sites."""
    p = {"w": jnp.asarray(draw(1, 4, 6))}
    names = names_of(None, [("w", "w.weight", "out in -> out in", "linear")])
    config = tied_lora.LoraConfig(r=2, target_modules=["w"], use_dora=True)
    adapted = tied_lora.wrap(p, config)
    with pytest.raises(AdapterFileError, match=r"rows \(0,\) and columns \(1,\).*sites=\.\.\."):
        save_adapter(tmp_path / "b", adapted, names)


def test_a_regex_that_backtracks_is_refused_and_is_not_written(tmp_path):
    put(tmp_path / "slow", factors("model.q_proj"), target_modules=r"(([a-z_0-9]+\.?)+)+#")
    with pytest.raises(AdapterFileError, match="may take hours to match") as e:
        load(tmp_path / "slow")
    assert f"{tmp_path / 'slow' / CONFIG}: LoraConfig: target_modules='(([a-z" in str(e.value)
    # The user's own is used, and saved as the names that it means.
    config = tied_lora.LoraConfig(r=2, target_modules=r"(\w+\.?)*q")
    adapted = tied_lora.wrap(params(), config, sites=SITES)
    save_adapter(tmp_path / "own", adapted, TIED_NAMES)
    written = json.loads((tmp_path / "own" / CONFIG).read_text())
    assert written["target_modules"] == ["model.q_proj"]
    assert set(load(tmp_path / "own").adapters["lora"]) == {"q/kernel"}


def test_half_of_a_tie_is_warned_of(tmp_path):
    """A head that the model does not read, beside the table that it reads in its place."""
    names = names_of({"model_type": "llama", "tie_word_embeddings": True})
    table = jnp.asarray(draw(0, 12, 4))
    both = {"model": {"embed_tokens": {"embedding": table}}, "lm_head": {"kernel": table.T}}
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.warns(tied_lora.WeightTyingWarning, match="values of"):
        apart = tied_lora.wrap(both, config)
    with pytest.warns(
        tied_lora.WeightTyingWarning,
        match=r"'lm_head/kernel' are one tensor; .*'model/embed_tokens/embedding' alone is adapted",
    ):
        save_adapter(tmp_path / "a", apart, names)
    tied = tied_lora.wrap(both, config, ties=[("model/embed_tokens/embedding", "lm_head/kernel")])
    alone = tied_lora.wrap({"model": both["model"]}, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(tmp_path / "b", tied, names)
        save_adapter(tmp_path / "c", alone, names)
    for folder in ("b", "c"):
        assert f"{PREFIX}lm_head.lora_A.weight" in load_file(tmp_path / folder / WEIGHTS)
