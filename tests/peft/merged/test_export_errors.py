"""Merged export refuses what would be another model in PyTorch, and says why."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora._peft.merged.export import save_merged
from flax_tied_lora.names import UnmappedError, names_of
from tests.helpers.merged_models import (
    CONFIG,
    LLAMA,
    LLAMA_SHAPES,
    NAMES,
    OWN_CONFIG,
    SHAPES,
    gpt2,
    llama,
    tied_llama,
)
from tests.helpers.name_tables import draw, own


def unmapped() -> Any:
    return {**draw(), "new": {"kernel": np.zeros((2, 3))}}


def separate() -> tied_lora.Adapted:
    with pytest.warns(tied_lora.WeightTyingWarning):
        return llama(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=False)


UNTIED_LLAMA = LLAMA | {"tie_word_embeddings": False}
BAD: dict[str, tuple[Any, ...]] = {
    # params, names, config, options, exception, what it says
    "no config": (gpt2, NAMES, None, {}, TypeError, "config is a NoneType"),
    "class": (gpt2, NAMES, dict, {}, TypeError, "config is a type; expected the transformers"),
    "no type": (gpt2, NAMES, {"vocab_size": 9}, {}, ValueError, "model_type is None"),
    "tunix's type": (
        gpt2, NAMES, {"model_type": "tunix/qwen3"}, {}, ValueError, "transformers' name of the"
    ),
    "tie": (gpt2, NAMES, CONFIG | {"tie_word_embeddings": 1}, {}, ValueError, "is 1; expected"),
    "text_config": (
        gpt2, NAMES, CONFIG | {"text_config": {}}, {}, ValueError, "give config.text_config"
    ),
    "quantised": (
        gpt2, NAMES, CONFIG | {"quantization_config": {"bits": 4}}, {}, ValueError,
        "merged tensors are not quantised",
    ),
    "no json": (
        gpt2, NAMES, CONFIG | {"problem_type": {1, 2}}, {}, ValueError,
        r"problem_type is \{1, 2\}, which JSON",
    ),
    "vocabulary": (
        gpt2, NAMES, CONFIG | {"vocab_size": 10}, {}, ValueError,
        r"vocab_size is 10, and transformer.wte.weight is \[9, 4\]; expected vocab_size=9",
    ),
    "width": (
        gpt2, NAMES, CONFIG | {"n_embd": 8}, {}, ValueError,
        r"n_embd is 8, and transformer.wte.weight is \[9, 4\]; expected n_embd=4",
    ),
    "untied config": (
        gpt2, NAMES, CONFIG | {"tie_word_embeddings": False}, {}, ValueError,
        "says tie_word_embeddings=False, and the names say .* PyTorch would make a random one",
    ),
    "untied config and names": (
        gpt2, names_of("gpt2", tie_word_embeddings=False),
        CONFIG | {"tie_word_embeddings": False}, {}, ValueError,
        "no leaf is the output projection of GPT2LMHeadModel: PyTorch would make a random one",
    ),
    "tied config, untied names": (
        lambda: draw(LLAMA_SHAPES), names_of(UNTIED_LLAMA), LLAMA, {}, ValueError,
        "have lm_head.weight as a tensor beside model.embed_tokens.weight: PyTorch would drop it",
    ),
    "tied params, all else untied": (
        llama, names_of(UNTIED_LLAMA), UNTIED_LLAMA, {}, ValueError,
        "'lm_head/kernel' and 'model/embed_tokens/embedding' are one array",
    ),
    "untied params, all else tied": (
        lambda: draw(LLAMA_SHAPES), names_of(LLAMA), LLAMA, {}, ValueError,
        "'lm_head/kernel' is not 'model/embed_tokens/embedding', which the names tie it to",
    ),
    "adapters on one of two": (
        lambda: llama(tied_llama(), []), names_of(LLAMA), LLAMA, {}, ValueError,
        r"tie them, wrap\(\.\.\., ties=\[\('model/embed_tokens/embedding', 'lm_head/kernel'\)\]\)",
    ),
    "separate": (separate, names_of(LLAMA), LLAMA, {}, ValueError, "say where the second copy"),
    "untie without need": (
        gpt2, NAMES, CONFIG, {"untie": {"lm_head": "lm_head/kernel"}}, ValueError,
        "for which there is no separate adapter",
    ),
    "untie of plain params": (
        lambda: draw(SHAPES), NAMES, CONFIG, {"untie": {"lm_head": "lm_head/kernel"}}, ValueError,
        "is for an Adapted with separate adapters, found plain params",
    ),
    "integers": (gpt2, NAMES, CONFIG, {"dtype": "int8"}, TypeError, "expected one of float32"),
    "no dtype": (gpt2, NAMES, CONFIG, {"dtype": "half-ish"}, TypeError, "dtype='half-ish'"),
    "float8": (gpt2, NAMES, CONFIG, {"dtype": "float8_e5m2"}, TypeError, "bfloat16, float16"),
    "shard size": (gpt2, NAMES, CONFIG, {"max_shard_size": "5 apples"}, ValueError, "'500MB'"),
    "names": (gpt2, "gpt2", CONFIG, {}, TypeError, "names is a str; expected what .*names_of"),
    "unmapped": (unmapped, own(), OWN_CONFIG, {}, UnmappedError, "'new/kernel'"),
    "nothing": (dict, NAMES, CONFIG, {}, ValueError, "the params have no leaves"),
    "taken out": (
        lambda: llama().params, names_of(LLAMA), LLAMA, {}, ValueError,
        "'lm_head/kernel' was taken out of these params by wrap; give the Adapted",
    ),
    "a float": (
        lambda: {**draw(), "gate": 1.0}, own(), OWN_CONFIG, {}, ValueError, "'gate' is a float"
    ),
    "abstract": (
        lambda: jax.eval_shape(lambda: draw(SHAPES)), NAMES, CONFIG, {}, ValueError,
        "is abstract, expected an array with values",
    ),
    "abstract adapted": (
        lambda: jax.eval_shape(lambda a: a, gpt2()), NAMES, CONFIG, {}, ValueError, "is abstract"
    ),
    "stacked": (
        lambda: tied_lora.stack([gpt2(), gpt2()]), NAMES, CONFIG, {}, ValueError,
        "stacked adapters are merged one by one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_explained_and_nothing_is_written(case, tmp_path):
    params, names, config, options, kind, says = BAD[case]
    with pytest.raises(kind, match=says):
        save_merged(tmp_path / "model", params(), names, config, **options)
    assert not list(tmp_path.iterdir())


def test_only_the_output_projection_can_have_a_copy_of_its_own(tmp_path):
    def model(params):
        table = params["transformer"]["wte"]["embedding"]
        return table[jnp.arange(3)] @ table.T

    params = draw(SHAPES)
    config = tied_lora.LoraConfig(r=2, target_modules=["wte", "lm_head"], ensure_weight_tying=False)
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = tied_lora.wrap(params, config, sites=tied_lora.trace(model, params))
    with pytest.raises(ValueError, match="one table for all of its lookups"):
        save_merged(tmp_path, adapted, NAMES, CONFIG, untie={"wte": "other/embedding"})
    untied = names_of("gpt2", tie_word_embeddings=False)
    with pytest.raises(UnmappedError, match="'other/kernel'"):
        save_merged(tmp_path, adapted, untied, CONFIG, untie={"lm_head": "other/kernel"})
    assert not list(tmp_path.iterdir())
    save_merged(tmp_path, adapted, NAMES, CONFIG, untie={"lm_head": "other/kernel"})
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].shape == (9, 4)
