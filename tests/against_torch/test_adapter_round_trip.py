"""Adapters that are trained in one library and used in the other, for each family and kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import peft
import pytest

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
    trained,
    with_peft,
)
from tests.against_torch.test_names_torch import (
    MAPPED,
    clip_of_old_jax,  # noqa: F401 - a fixture, for all tests here
)
from tests.against_torch.torch_models import far
from tests.helpers.damage import CONFIG, WEIGHTS
from tests.models.families import FAMILIES

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::flax_tied_lora._planning.tying.WeightTyingWarning"),
]
# What makes PEFT tie. Of BERT's and RoBERTa's names it knows none, and BART's it trains apart.
TIED_TARGET = {
    "gpt2": "lm_head", "gpt_neo": "lm_head", "bloom": "lm_head", "bert": None, "roberta": None,
    "t5": None, "bart": None,
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_trained_here_and_used_there(name, tmp_path):
    mine = model(name)
    # PEFT cannot adapt T5's shared table: its encoder and decoder read it past every module.
    table = [] if name == "t5" else [mine.family.targets[0]]
    adapted = trained(mine, mine.wrap(target_modules=[*table, *attention(mine.family)]))
    mine.save(tmp_path / "ours", adapted)
    theirs = load_there(mine, tmp_path / "ours")
    ours = logits_here(mine, adapted)
    assert far(logits_there(mine, theirs), ours) < 1e-4
    assert far(ours, mine.base) > 0.1
    assert config_in(tmp_path / "ours")["ensure_weight_tying"] is bool(table)

    again = mine.load(tmp_path / "ours")
    assert_same_tree(again.adapters, adapted.adapters)
    assert_same_tree(again.scaling, adapted.scaling)
    mine.save(tmp_path / "again", again)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("name", MAPPED)
def test_trained_there_and_used_here(name, tmp_path):
    mine = model(name)
    table = TIED_TARGET.get(name, "embed_tokens")
    theirs = with_peft(
        mine, target_modules=[*([table] if table else []), *attention(mine.family)],
        ensure_weight_tying=bool(table),
    )  # fmt: skip
    train_there(mine, theirs)
    save_there(theirs, tmp_path / "theirs")
    adapted = mine.load(tmp_path / "theirs")
    assert (mine.family.table in adapted.adapters["lora"]) == bool(table)
    expected = logits_there(mine, theirs)
    assert far(logits_here(mine, adapted), expected) < 1e-4
    assert far(expected, mine.base) > 0.1

    mine.save(tmp_path / "ours", adapted)
    # PEFT writes "transformer.wte" for "lm_head", and reads that as untied; here both are listed.
    rewritten = ["target_modules"] if table == "lm_head" else []
    assert_same_files(tmp_path / "ours", tmp_path / "theirs", *rewritten)


def assert_same_files(ours: Any, theirs: Any, *rewritten: str) -> None:
    """Fails unless ours has PEFT's tensors, the base's embeddings aside, and its config."""
    found, expected = tensors_in(ours), tensors_in(theirs)
    base = {n for n in expected if n.endswith(".base_layer.weight")}
    # PEFT's `bias` finds those of a saved module again, under names that it never reads.
    base |= {n for n in expected if ".modules_to_save." in n or ".original_module." in n}
    expected = {n: x for n, x in expected.items() if n not in base}
    for name in [n for n in expected if ".shared." in n]:  # BART's, which its model never reads
        expected[name] = expected[name.replace("shared", "encoder.embed_tokens")]
    assert set(found) == set(expected)
    for name, x in found.items():
        assert x.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    ours, theirs = (dataclass_of(folder) for folder in (ours, theirs))
    # PEFT's goes by the kind of layer that it met last.
    for field in set(theirs) - {"fan_in_fan_out", "task_type", *rewritten}:
        value = theirs[field]
        if field in ("target_modules", "modules_to_save") and not isinstance(value, str | None):
            assert as_set(ours[field]) >= as_set(value), field  # what PEFT adds by tying is named
            continue
        assert as_set(ours[field]) == as_set(value), field


def dataclass_of(folder: Any) -> dict[str, Any]:
    """Returns the config as PEFT's own class reads it."""
    fields = dataclasses.asdict(peft.LoraConfig.from_pretrained(str(folder)))
    fields["peft_version"] = fields["peft_version"].partition("@")[0]
    return fields


def as_set(value: Any) -> Any:
    return set(value) if isinstance(value, list | tuple) else value


def kinds(name: str) -> dict[str, dict[str, Any]]:
    """Returns configs for a family, by what they show; for PEFT and for us."""
    family = FAMILIES[name]
    projections = attention(family)
    table = TIED_TARGET.get(name, "embed_tokens")
    embedding = family.table.rpartition("/")[0].replace("/", ".")
    first, norm = projections[0], "model.norm" if name == "llama" else "ln_f"
    found: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True, "bias": "all", "lora_alpha": 2.5},
        "bias_lora_only": {"bias": "lora_only"},
        "tokens": {"trainable_token_indices": [3, 95, 40]},
        "tokens_dict": {"trainable_token_indices": {embedding.rpartition(".")[2]: [7, 2]}},
        "tokens_apart": {
            "trainable_token_indices": {embedding: [7, 2], "lm_head": [5]},
            "ensure_weight_tying": False,
        },
        "saved_tied": {"modules_to_save": [table], "ensure_weight_tying": True},
        "saved_bias": {"modules_to_save": [norm], "bias": "all"},
        "saved_apart": {"modules_to_save": ["lm_head"], "ensure_weight_tying": False},
        "table_tied": {"target_modules": [table, *projections], "ensure_weight_tying": True},
        "table_apart": {
            "target_modules": [embedding, "lm_head", *projections], "ensure_weight_tying": False,
        },
        "table_half": {"target_modules": ["lm_head", *projections], "ensure_weight_tying": False},
        "all_linear": {"target_modules": "all-linear"},
        "regex": {"target_modules": rf".*\.[01]\..*{first}"},
        "excluded": {"exclude_modules": [f"0.{'attn' if name == 'gpt2' else 'self_attn'}.{first}"]},
        "layers": {"layers_to_transform": [1]},
        "layers_pattern": {"layers_to_transform": 1,
                           "layers_pattern": "h" if name == "gpt2" else "layers"},
        "patterns": {"rank_pattern": {first: 2}, "alpha_pattern": {first: 3}},
        "rslora": {"use_rslora": True, "rank_pattern": {first: 2}},
        "pissa": {"init_lora_weights": "pissa"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
    }  # fmt: skip
    if name == "llama":
        # GPT-2's Conv1D is the other way round: PEFT 0.21 takes OLoRA's QR of it as it is.
        found["olora"] = {"init_lora_weights": "olora"}
    return {k: {"target_modules": projections, **f} for k, f in found.items()}


ALL = [(n, k) for n in ("gpt2", "llama") for k in kinds(n)]
# What says nothing new in this direction is left out.
BACK = [(n, k) for n, k in ALL if k not in ("excluded", "layers", "table_half", "saved_apart")]
EXACT = {"pissa": 1e-4, "olora": 1e-4}


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_kinds_from_here_to_there(name, kind, tmp_path):
    mine, fields = model(name), kinds(name)[kind]
    adapted = moved(mine.wrap(**fields))
    mine.save(tmp_path / "ours", adapted)
    theirs = load_there(mine, tmp_path / "ours")
    ours = logits_here(mine, adapted)
    assert far(logits_there(mine, theirs), ours) < EXACT.get(kind, 1e-5)
    assert far(ours, mine.base) > 1e-3

    again = mine.load(tmp_path / "ours")
    assert_same_tree(again.adapters, adapted.adapters)
    assert_same_tree(again.scaling, adapted.scaling)
    mine.save(tmp_path / "again", again)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    # As it was written, and what PEFT would add by tying: PEFT understands the same by it.
    config = config_in(tmp_path / "ours")
    for field, value in fields.items():
        more = field in ("target_modules", "modules_to_save") and isinstance(value, list)
        assert (config[field][: len(value)] if more else config[field]) == value, field
        assert getattr(again.plan.config, field) == getattr(adapted.plan.config, field)


@pytest.mark.parametrize(("name", "kind"), BACK)
def test_kinds_from_there_to_here(name, kind, tmp_path):
    mine, fields = model(name), kinds(name)[kind]
    theirs = with_peft(mine, **fields)
    train_there(mine, theirs, steps=2)
    save_there(theirs, tmp_path / "theirs")
    adapted = mine.load(tmp_path / "theirs")
    expected = logits_there(mine, theirs)
    assert far(logits_here(mine, adapted), expected) < EXACT.get(kind, 1e-5)
    mine.save(tmp_path / "ours", adapted)
    rewritten = []
    if name == "gpt2" and kind in ("table_tied", "saved_tied"):  # as above
        rewritten = ["target_modules", "modules_to_save"]
    assert_same_files(tmp_path / "ours", tmp_path / "theirs", *rewritten)
