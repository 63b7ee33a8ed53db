"""The config.json of a merged model: as given, completed by what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from flax_tied_lora._peft.merged.export import save_merged
from flax_tied_lora.names import names_of
from tests.helpers.merged_models import CONFIG, LLAMA, LLAMA_SHAPES, NAMES, SHAPES, gpt2
from tests.helpers.name_tables import draw


def stored(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def config_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


class TestConfig:
    def test_it_is_written_as_given_and_completed(self, tmp_path):
        class Config:
            def to_dict(self):
                return CONFIG | {"architectures": ["FlaxGPT2LMHeadModel"], "id2label": {0: "ü"}}

        save_merged(tmp_path, gpt2(), NAMES, Config())
        assert config_in(tmp_path) == CONFIG | {
            "id2label": {"0": "ü"}, "dtype": "float32", "tie_word_embeddings": True
        }  # fmt: skip

    def test_a_head_beside_the_table_is_untied(self, tmp_path):
        config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
        save_merged(tmp_path, draw(LLAMA_SHAPES), names_of("llama"), config)
        assert config_in(tmp_path)["tie_word_embeddings"] is False
        assert "lm_head.weight" in stored(tmp_path)

    def test_a_model_without_a_head_says_nothing(self, tmp_path):
        bare = draw(SHAPES)["transformer"]
        save_merged(tmp_path, bare, NAMES, CONFIG | {"architectures": ["GPT2Model"]})
        assert "tie_word_embeddings" not in config_in(tmp_path)
