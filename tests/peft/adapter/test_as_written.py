"""A saved config names all that a file holds; what was written comes back, unless it changed."""

from __future__ import annotations

import json

import pytest

from flax_tied_lora._peft.adapter.as_written import KEY, with_written
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.helpers.damage import CONFIG
from tests.peft.adapter.test_plain_form import NAMES, PARAMS, adapter

FIELDS = {
    "target_modules": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("field", FIELDS)
def test_the_head_of_a_tie_is_named_and_what_was_written_comes_back(tmp_path, field):
    adapted = adapter(**FIELDS[field])
    save_adapter(tmp_path, adapted, NAMES)
    config = json.loads((tmp_path / CONFIG).read_text())
    written = FIELDS[field][field]
    assert config[field] == [*written, "lm_head"]
    found = load_adapter(tmp_path, PARAMS, NAMES).plan.config
    assert getattr(found, field) == getattr(adapted.plan.config, field) == tuple(written)

    config[field] = [*config[field], "model.norm"] if field == "modules_to_save" else ["lm_head"]
    kept = {KEY: json.dumps({field: {"written": written, "saved": [*written, "lm_head"]}})}
    assert with_written(config, kept) == config  # changed since


@pytest.mark.parametrize(
    "note", ["", "[]", "{", '{"target_modules": 3}', '{"target_modules": {"written": ["a"]}}',
             '{"target_modules": {"written": ["a"], "saved": ["b"]}}']
)  # fmt: skip
def test_a_note_that_is_damaged_says_nothing(note):
    config = {"target_modules": ["b"], "modules_to_save": None}
    assert with_written(config, {KEY: note}) == config
