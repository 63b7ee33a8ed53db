"""Ties that a loader lost: errors that say how to repair them, and what a repair drops."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import load_adapter, save_adapter

EMBED, HEAD = "model/embed_tokens/embedding", "lm_head/kernel"
Q = "model/layers/0/self_attn/q_proj/kernel"
TIED = {"model_type": "llama", "vocab_size": 12, "hidden_size": 4, "tie_word_embeddings": True}
UNTIED = TIED | {"tie_word_embeddings": False}
NAMES = names_of(TIED)
CONFIG = LoraConfig(r=2, target_modules=["q_proj"])
LOST = (
    rf"^%s: the model ties '{HEAD}' to '{EMBED}', and these params have arrays of other values .*"
    rf"ties=model\.config, which drops '{HEAD}' and reads '{EMBED}' in its place; or if '{HEAD}' "
    r"was trained by itself, .* tie_word_embeddings=False$"
)


def params(head=None):
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (12, 4))
    head = jax.random.normal(keys[1], (4, 12)) if head is None else head(table)
    q = {"self_attn": {"q_proj": {"kernel": jax.random.normal(keys[2], (4, 4))}}}
    return {
        "model": {"embed_tokens": {"embedding": table}, "layers": {"0": q}},
        "lm_head": {"kernel": head},
    }


@pytest.fixture
def saved(tmp_path):
    tied = {k: v for k, v in params().items() if k == "model"}
    save_adapter(tmp_path / "adapter", tied_lora.wrap(tied, CONFIG), NAMES)
    return tmp_path / "adapter"


def test_loading_onto_a_random_head(saved):
    with pytest.raises(ValueError, match=LOST % "load_adapter"):
        load_adapter(saved, params(), NAMES)
    with pytest.raises(ValueError, match=LOST % "load_adapter"):  # embeddings of the file: no help
        load_adapter(saved, params(), NAMES, base_embeddings="load")
    with pytest.warns(tied_lora.WeightTyingWarning, match="'lm_head/kernel' is dropped"):
        adapted = load_adapter(saved, params(), NAMES, ties=TIED)
    np.testing.assert_array_equal(
        tied_lora.base(adapted)["lm_head"]["kernel"],
        adapted.params["model"]["embed_tokens"]["embedding"].T,
    )
    save_adapter(saved.parent / "back", adapted, NAMES)
    kept = load_adapter(saved, params(), names_of(UNTIED), ties=UNTIED)
    assert kept.params["lm_head"]["kernel"].shape == (4, 12)


def test_saving_with_a_random_head(tmp_path):
    adapted = tied_lora.wrap(params(), CONFIG)
    with pytest.raises(ValueError, match=LOST % "save_adapter"):
        save_adapter(tmp_path / "adapter", adapted, NAMES)
    assert not (tmp_path / "adapter").exists()
    save_adapter(tmp_path / "adapter", adapted, names_of(UNTIED))


def test_a_copy_with_the_same_values_is_tied(saved):
    adapted = load_adapter(saved, params(lambda table: jnp.array(table.T)), NAMES)
    assert adapted.params["lm_head"]["kernel"] == tied_lora.TiedLeaf(EMBED, True)
    save_adapter(saved.parent / "back", adapted, NAMES)


def test_names_say_what_is_tied():
    with pytest.raises(ValueError, match=LOST % "find_ties"):
        tied_lora.wrap(params(), CONFIG, ties=NAMES)
    copies = params(lambda table: jnp.array(table.T))
    groups = tied_lora.wrap(copies, CONFIG, ties=NAMES).plan.groups
    assert [g.paths for g in (group.tie() for group in groups) if len(g.members) > 1] == [
        (EMBED, HEAD)
    ]
    alone = {k: v for k, v in copies.items() if k == "model"}
    assert not [g for g in tied_lora.find_ties(alone, NAMES) if len(g.members) > 1]
    abstract = jax.eval_shape(lambda: copies)  # of shapes nothing else is known
    assert any(len(g.members) > 1 for g in tied_lora.find_ties(abstract, NAMES))


def test_a_config_that_drops_a_leaf_says_so():
    expected = (
        rf"wrap: the model's config ties '{HEAD}' to '{EMBED}', and its values are others: "
        rf"'{HEAD}' is dropped, .* To keep it, pass ties="
    )
    with pytest.warns(tied_lora.WeightTyingWarning, match=expected):
        tied_lora.wrap(params(), CONFIG, ties=TIED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tied_lora.wrap(params(lambda table: jnp.array(table.T)), CONFIG, ties=TIED)
        tied_lora.wrap(jax.eval_shape(params), CONFIG, ties=TIED)


class Config:
    tie_word_embeddings = True
    vocab_size = 12


class Model:
    def __init__(self):
        self.config, self.params = Config(), params()

    def __call__(self, x, params=None):
        return params["model"]["embed_tokens"]["embedding"][x] @ params["lm_head"]["kernel"]


def test_a_model_whose_config_ties_what_the_adapted_has_apart():
    model = Model()
    with pytest.raises(ValueError, match=LOST % "AdaptedModel"):
        tied_lora.AdaptedModel(model, tied_lora.wrap(model.params, CONFIG))
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = tied_lora.wrap(model.params, CONFIG, ties=model.config)
    table = model.params["model"]["embed_tokens"]["embedding"]
    with pytest.warns(tied_lora.UnreadTargetWarning):
        out = tied_lora.AdaptedModel(model, adapted)(jnp.arange(3))
    np.testing.assert_allclose(out, table[:3] @ table.T, rtol=1e-5)
