"""What PEFT does otherwise or cannot say, as adapters go from one library to the other."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from flax_tied_lora.peft import AdapterFileError, load_adapter
from tests.against_torch.round_trip import (
    assert_same_tree,
    attention,
    config_in,
    load_there,
    logits_here,
    logits_there,
    model,
    moved,
    save_there,
    tensors_in,
    train_there,
    with_peft,
)
from tests.against_torch.test_names_torch import (
    clip_of_old_jax,  # noqa: F401 - a fixture, for all tests here
)
from tests.against_torch.torch_models import far
from tests.helpers.damage import CONFIG

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::flax_tied_lora._planning.tying.WeightTyingWarning"),
]


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_flag(name, flag, tmp_path):
    """None becomes what was done: PEFT takes a config that says nothing for False."""
    mine = model(name)
    for targets, tied in (([mine.family.targets[0]], True), (attention(mine.family), False)):
        if flag is False and tied:
            targets = [mine.family.targets[0], "lm_head"]
        adapted = moved(mine.wrap(target_modules=targets, ensure_weight_tying=flag))
        mine.save(tmp_path, adapted, overwrite=True)
        assert config_in(tmp_path)["ensure_weight_tying"] is (tied if flag is None else flag)
        theirs = load_there(mine, tmp_path)
        assert far(logits_there(mine, theirs), logits_here(mine, adapted)) < 1e-5
        assert_same_tree(mine.load(tmp_path).adapters, adapted.adapters)


@pytest.mark.parametrize("name", ["bert", "bart", "opt"])
@pytest.mark.parametrize("kind", ["saved", "saved_bias", "tokens", "bias"])
def test_other_families(name, kind, tmp_path):
    """Where PEFT knows the table by another name, or a tied head has a bias of its own."""
    mine = model(name)
    table = mine.family.targets[0]
    fields = {
        "saved": {"modules_to_save": [table]},
        "saved_bias": {"modules_to_save": [table], "bias": "all"},
        "tokens": {"trainable_token_indices": {table: [5, 1]}},
        "bias": {"target_modules": [table, *attention(mine.family)], "bias": "lora_only"},
    }[kind]
    adapted = moved(mine.wrap(**{"target_modules": attention(mine.family)[:1], **fields}))
    mine.save(tmp_path / "ours", adapted)
    theirs = load_there(mine, tmp_path / "ours")
    found = logits_there(mine, theirs)
    if (name, kind) == ("bert", "tokens"):  # PEFT 0.21 leaves a head's bias out where it has rows.
        found = found + np.asarray(mine.params["cls"]["predictions"]["bias"])
    assert far(found, logits_here(mine, adapted)) < 1e-5
    again = mine.load(tmp_path / "ours")
    assert_same_tree(again.adapters, adapted.adapters)
    save_there(theirs, tmp_path / "theirs")
    if (name, kind) != ("bart", "saved_bias"):  # PEFT trains final_logits_bias and does not save it
        back = mine.load(tmp_path / "theirs")
        assert far(logits_here(mine, back), logits_here(mine, adapted)) < 1e-6


def test_bart_s_lookups_that_peft_trains_apart(tmp_path):
    """Told to tie, PEFT ties nothing to the first of two modules that a name means."""
    mine = model("bart")
    theirs = with_peft(mine, target_modules=["embed_tokens"], ensure_weight_tying=True)
    train_there(mine, theirs)
    save_there(theirs, tmp_path)
    with pytest.raises(AdapterFileError, match=r"decoder.embed_tokens.* differs from .*encoder"):
        mine.load(tmp_path)


CANNOT = {
    "dora_of_a_tied_table": ("gpt2", {"target_modules": ["wte"], "use_dora": True}, "use_dora"),
    "tokens_beside_factors": (
        "gpt2", {"target_modules": ["wte"], "trainable_token_indices": [3]}, "trainable tokens",
    ),
    "pissa_niter": (
        "gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa_niter_4"}, "niter_4",
    ),
    "t5_table": ("t5", {"target_modules": ["shared", "q"]}, "'shared/embedding' is T5's"),
    "t5_saved": ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}, "is T5's shared"),
    "t5_tokens": ("t5", {"target_modules": ["q"], "trainable_token_indices": [3]}, "T5's"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_what_peft_s_file_cannot_say(case, tmp_path):
    name, fields, message = CANNOT[case]
    mine = model(name)
    adapted = mine.wrap(**fields)
    with pytest.raises(AdapterFileError, match=message) as caught:
        mine.save(tmp_path / "ours", adapted)
    assert "save_merged" in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_stacked_adapters_are_saved_one_by_one(tmp_path):
    mine = model("gpt2")
    adapted = moved(mine.wrap(target_modules=["c_attn"]))
    stacked = adapted.replace(
        adapters=jax.tree.map(lambda x: jax.numpy.stack([x, x]), adapted.adapters)
    )
    with pytest.raises(AdapterFileError, match=r"c_attn/kernel' is \[2, 32, 4\].*one by one"):
        mine.save(tmp_path / "ours", stacked)
    assert not (tmp_path / "ours").exists()


def test_another_scaling_is_in_the_file(tmp_path):
    """What was scaled after `wrap` is as strong in PEFT."""
    mine = model("gpt2")
    adapted = moved(mine.wrap(target_modules=["c_attn", "lm_head"], use_rslora=True))
    scaling = dict(adapted.scaling)
    key = "transformer/h/0/attn/c_attn/kernel"
    scaling[key] = scaling[key] * 0.25
    adapted = adapted.replace(scaling=scaling)
    mine.save(tmp_path, adapted)
    assert config_in(tmp_path)["alpha_pattern"] == {"transformer.h.0.attn.c_attn": 1.5}
    theirs = load_there(mine, tmp_path)
    assert far(logits_there(mine, theirs), logits_here(mine, adapted)) < 1e-5
    assert_same_tree(mine.load(tmp_path).scaling, adapted.scaling)


def test_base_embeddings_that_peft_adds(tmp_path):
    mine = model("llama")
    theirs = with_peft(mine, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    train_there(mine, theirs)
    save_there(theirs, tmp_path, save_embedding_layers=True)
    assert any(n.endswith("base_layer.weight") for n in tensors_in(tmp_path))
    expected = logits_there(mine, theirs)
    assert far(logits_here(mine, mine.load(tmp_path)), expected) < 1e-5

    other = jax.tree.map(lambda x: x * 2, mine.params)
    with pytest.raises(AdapterFileError, match=r'base_layer.weight .*base_embeddings="ignore"'):
        load_adapter(tmp_path, other, mine.names, sites=mine.sites, ties=mine.family.ties)


def test_copies_that_peft_trained_apart(tmp_path):
    """A config that says tied, and copies that are not: an error, or two adapters."""
    mine = model("llama")
    theirs = with_peft(mine, target_modules=["embed_tokens", "lm_head"])
    train_there(mine, theirs)
    save_there(theirs, tmp_path)
    fields = config_in(tmp_path)
    assert fields["ensure_weight_tying"] is False
    expected = logits_there(mine, theirs)
    assert far(logits_here(mine, mine.load(tmp_path)), expected) < 1e-5

    (tmp_path / CONFIG).write_text(json.dumps(fields | {"ensure_weight_tying": True}))
    with pytest.raises(AdapterFileError, match=r'differs from .*tied_copies="apart"'):
        mine.load(tmp_path)
    apart = mine.load(tmp_path, tied_copies="apart")
    assert len(apart.adapters["lora"]) == 2
    assert far(logits_here(mine, apart), expected) < 1e-5
