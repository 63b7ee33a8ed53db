"""save_adapter(plain=True): a reader of lora_A, lora_B, r and lora_alpha alone serves it right."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic
from flax_tied_lora.names import names_of, to_state_dict
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter
from tests.helpers.damage import CONFIG, WEIGHTS
from tests.helpers.merged_in_torch import merged_in_torch
from tests.helpers.oracle import array
from tests.helpers.small_adapters import PREFIX

NAMES = names_of({"model_type": "llama", "vocab_size": 24, "tie_word_embeddings": True})
HEADS = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}


def layer(seed):
    attention = {n: {"kernel": array(8, HEADS[n], seed=seed + i)} for i, n in enumerate(HEADS)}
    mlp = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
    kernels = {n: {"kernel": array(*s, seed=seed + i)} for i, (n, s) in enumerate(mlp.items(), 4)}
    return {"self_attn": attention, "mlp": kernels}


PARAMS = {"model": {
    "embed_tokens": {"embedding": array(24, 8, seed=1)},
    "layers": {"0": layer(2), "1": layer(12)}, "norm": {"weight": jnp.ones(8)},
}}  # fmt: skip
BASE = to_state_dict(PARAMS, NAMES, duplicates=True)
ATTENTION = list(HEADS)
KINDS = {
    "attention": {"target_modules": ATTENTION},
    "query and up alone": {"target_modules": ["q_proj", "up_proj"]},
    "the tie by one name": {"target_modules": ["embed_tokens", "q_proj"]},
    "rslora": {"target_modules": ["embed_tokens", *ATTENTION], "use_rslora": True},
    "patterns": {
        "target_modules": ["embed_tokens", *ATTENTION], "rank_pattern": {"o_proj": 1},
        "alpha_pattern": {"embed_tokens": 5, "layers.1.self_attn.o_proj": 3},
    },
    "a regex": {"target_modules": r".*layers\.1\..*_proj"},
    "layers": {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 20, 7]},
}  # fmt: skip


def adapter(**fields):
    config = tied_lora.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})
    adapted = tied_lora.wrap(PARAMS, config)
    leaves, treedef = jax.tree.flatten(adapted.adapters)
    moved = [x + array(*x.shape, seed=i) / 4 for i, x in enumerate(leaves)]
    return adapted.replace(adapters=jax.tree.unflatten(treedef, moved))


def state(adapted):
    return to_state_dict(tied_lora.merge(adapted), NAMES, duplicates=True)


def assert_same(found, expected, bound=2e-5):
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, bound, bound, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_simple_reader_serves_it_right(tmp_path, kind):
    adapted = adapter(**KINDS[kind])
    save_adapter(tmp_path, adapted, NAMES, plain=True)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert config["lora_alpha"] == config["r"]
    for field in ("use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform",
                  "exclude_modules", "trainable_token_indices", "modules_to_save"):  # fmt: skip
        assert not config[field], field
    modules = {n.removeprefix(PREFIX).partition(".lora_")[0] for n in tensors}
    assert set(config["target_modules"]) == modules
    ranks = {
        x.shape[0 if n.removesuffix(".weight").endswith("A") else 1] for n, x in tensors.items()
    }
    assert ranks == {config["r"]}
    for module in modules:  # what vLLM and SGLang compute in one product is there together
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent, _, last = module.rpartition(".")
            assert last not in fused or {f"{parent}.{name}" for name in fused} <= modules
    assert_same(merged_in_torch(tmp_path, BASE), state(adapted))
    again = load_adapter(tmp_path, PARAMS, NAMES)
    assert_same(state(again), state(adapted))
    save_adapter(tmp_path, again, NAMES, plain=True, overwrite=True)
    assert json.loads((tmp_path / CONFIG).read_text()) == config
    for name, x in load_file(tmp_path / WEIGHTS).items():
        np.testing.assert_array_equal(x, tensors[name], err_msg=name)


def test_factors_that_started_from_the_weight(tmp_path):
    adapted = adapter(target_modules=ATTENTION, init_lora_weights="pissa")
    with pytest.raises(AdapterFileError, match=r"plain=True: .*residual; pass base_params="):
        save_adapter(tmp_path / "a", adapted, NAMES, plain=True)
    assert not (tmp_path / "a").exists()
    save_adapter(tmp_path, arithmetic.plain(adapted, PARAMS), NAMES, plain=True)
    assert_same(merged_in_torch(tmp_path, BASE), state(adapted), 1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "q_proj/kernel' is DoRA .*save_merged"),
        ({"modules_to_save": ["norm"]}, "norm/weight' is trained in full .*save_merged"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(tmp_path, fields, message):
    adapted = adapter(target_modules=["q_proj"], **fields)
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(tmp_path / "a", adapted, NAMES, plain=True)
    assert not (tmp_path / "a").exists()


def test_narrower_factors(tmp_path):
    adapted = adapter(target_modules=["q_proj"])
    save_adapter(tmp_path, adapted, NAMES, plain=True, dtype="bfloat16")
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {jnp.dtype("bfloat16")}
    assert_same(state(load_adapter(tmp_path, PARAMS, NAMES)), state(adapted), 0.02)


def test_one_scale_for_all_is_in_alpha_in_any_form(tmp_path):
    fields = {"target_modules": ATTENTION, "alpha_pattern": {"o_proj": 5}}
    adapted = arithmetic.scale(adapter(**fields), 0.5)
    save_adapter(tmp_path, adapted, NAMES)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (1.5, {"o_proj": 2.5})
    assert_same(state(load_adapter(tmp_path, PARAMS, NAMES)), state(adapted))
