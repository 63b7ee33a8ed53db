"""The README of a saved adapter says what was saved; the task type is that of the model's head."""

from __future__ import annotations

import json

import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import save_adapter
from tests.helpers.damage import CONFIG
from tests.helpers.oracle import array
from tests.peft.adapter.test_plain_form import NAMES, adapter


def test_it_says_what_was_saved(tmp_path):
    adapted = adapter(
        target_modules=["embed_tokens", "q_proj"], rank_pattern={"q_proj": 1}, use_rslora=True,
        modules_to_save=["norm"], base_model_name_or_path="me/base",
    )  # fmt: skip
    save_adapter(tmp_path, adapted, NAMES)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "base_model: me/base\n", "library_name: peft\n", "| rank | 1, 2 |",
        "| adapts | `embed_tokens`, `lm_head`, `q_proj` |", "| lora_alpha | 3, rsLoRA |",
        "one delta for `model.embed_tokens` and `lm_head`, in the file once for each",
        "| trained in full | `model.norm` |", f"flax_tied_lora {tied_lora.__version__}",
        "AutoPeftModelForCausalLM.from_pretrained(HERE)", "--max-lora-rank 8 ",
        "page on serving elsewhere",
    ):  # fmt: skip
        assert text in card, text


def test_a_base_of_ones_own_and_a_plain_adapter(tmp_path):
    save_adapter(tmp_path, adapter(target_modules=["q_proj"]), NAMES, plain=True,
                 base_model_name_or_path="/data/base")  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert "| base | `/data/base` |" in card
    assert "no adapted module shares its weight" in card
    assert "serving elsewhere" not in card


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_adapter(tmp_path, adapter(target_modules=["q_proj"]), NAMES)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("llama", {}, "CAUSAL_LM"), ("own", {}, None),
        ("llama", {"score": {"kernel": (8, 2)}}, None),
    ],
)  # fmt: skip
def test_the_task_type_is_that_of_the_head(tmp_path, model, more, expected):
    lines = [("model/embed_tokens/embedding", "model.embed_tokens.weight", None, "embedding"),
             ("score/kernel", "score.weight")]  # fmt: skip
    names = names_of(None, lines) if model == "own" else names_of(
        {"model_type": model, "tie_word_embeddings": True}, lines[1:]
    )  # fmt: skip
    params = {"model": {"embed_tokens": {"embedding": array(24, 8)}}}
    params |= {name: {"kernel": array(*leaf["kernel"])} for name, leaf in more.items()}
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"])
    save_adapter(tmp_path, tied_lora.wrap(params, config), names)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == expected


def test_a_task_type_that_was_written_stays(tmp_path):
    save_adapter(
        tmp_path, adapter(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"), NAMES
    )
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"
