"""What configs of transformers say of ties, held to what its PyTorch classes do."""

from __future__ import annotations

import json
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of

# Written by tests/against_torch/ties_of_classes.py, which says what the letters are.
TABLE: dict[str, dict[str, list[Any]]] = json.loads(
    Path(__file__).with_name("ties_of_classes.json").read_text()
)
SAID = {"T": True, "F": False}
TIED, SCALED = "tie_word_embeddings", "scale_decoder_outputs"
# Their checkpoints of T5 v1.1 have a head of their own. transformers 5 makes a tied model, and
# unties it where a checkpoint's head has other values; transformers 4 does as it is told.
T5_KIN = ("longt5", "t5", "umt5")
RNG = np.random.default_rng(0)
PARAMS = {
    "shared": {"embedding": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32)},
    "lm_head": {"kernel": jnp.asarray(RNG.normal(size=(8, 12)), jnp.float32)},
}
SHAPES = jax.eval_shape(lambda: PARAMS)


def fields_of(kind: str, part: str | None, said: str, release: str) -> dict[str, Any]:
    """Returns a config.json with what was said of its own tie, its text part's, and its scale."""
    own, text, scale = said
    fields: dict[str, Any] = {"model_type": kind, "transformers_version": release}
    fields |= {name: SAID[x] for name, x in ((TIED, own), (SCALED, scale)) if x in SAID}
    if part:
        fields[part] = {"model_type": "part", **({TIED: SAID[text]} if text in SAID else {})}
    return fields


def as_object(fields: dict[str, Any]) -> types.SimpleNamespace:
    inner = {k: types.SimpleNamespace(**v) for k, v in fields.items() if isinstance(v, dict)}
    values = {k: v for k, v in fields.items() if k != "transformers_version"}
    return types.SimpleNamespace(**values | inner, to_dict=lambda: fields)


def is_tied(config: Any, params: Any = SHAPES) -> bool:
    return bool(tied_lora.find_ties(params, config))


@pytest.mark.parametrize("release", TABLE)
def test_a_config_ties_what_the_class_does(release):
    wrong, unsaid = [], set()
    for kind, (_, part, *rows) in TABLE[release].items():
        for row in rows:
            expected = SAID[row[6]]
            if kind in T5_KIN and row[2] == "F":
                assert expected  # when this ends, so does the exception
                expected = False
            if is_tied(as_object(fields_of(kind, part, row[:3], release))) is not expected:
                wrong.append((kind, "object", row))
            try:
                tied = is_tied(fields_of(kind, part, row[3:6], release))
            except ValueError:
                unsaid.add(kind)
            else:
                if tied is not expected:
                    wrong.append((kind, "config.json", row))
    assert not wrong
    # They are asked for: transformers 4 leaves out the flag of a text part where it is the
    # default of the part's class.
    assert all(release.startswith("4.") and TABLE[release][kind][1] for kind in unsaid)


def test_the_table_has_both_releases_of_what_ties():
    four, five = (set(TABLE[release]) for release in sorted(TABLE))
    assert len(four) > 150
    assert len(five) > 250
    assert {"llama", "gemma3", "qwen3", "t5", "mt5", "udop", "vilt", "pop2piano"} <= four & five


@pytest.mark.parametrize("kind", T5_KIN)
def test_an_untied_t5_is_untied_in_both_releases(kind):
    five = {"model_type": kind, TIED: True, SCALED: False, "transformers_version": "5.24.0"}
    four = {"model_type": kind, TIED: False, "transformers_version": "4.57.6"}
    config = tied_lora.LoraConfig(r=2, target_modules=["shared"])
    for fields in (five, four):
        for said in (fields, as_object(fields)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                adapted = tied_lora.wrap(PARAMS, config, ties=said)
            np.testing.assert_array_equal(
                tied_lora.merge(adapted)["lm_head"]["kernel"], PARAMS["lm_head"]["kernel"]
            )
    if kind == "t5":
        assert "lm_head.weight" not in dict(names_of(four).tied).get("shared/embedding", ())
        assert names_of(five).tied == names_of(four).tied != names_of("t5").tied


@pytest.mark.parametrize("kind", ["mt5", "udop", "vilt"])
def test_a_config_that_is_forced_ties_what_has_the_same_values(kind):
    """transformers 5 forgets what these were told, and unties what differs in a checkpoint."""
    five = {"model_type": kind, TIED: True, "transformers_version": "5.24.0"}
    assert not is_tied(five, PARAMS)
    assert not is_tied(as_object(five), PARAMS)
    copied = PARAMS | {"lm_head": {"kernel": jnp.array(PARAMS["shared"]["embedding"].T)}}
    assert is_tied(five, copied)
    assert is_tied(five)
    assert is_tied(five | {"transformers_version": "4.57.6"}, PARAMS)


def test_what_drops_a_leaf_says_so_and_how_to_keep_it(tmp_path):
    expected = (
        r"^%s: the model's config ties 'lm_head/kernel' to 'shared/embedding', and its values are "
        r"others: 'lm_head/kernel' is dropped, .* To keep it, pass "
        r'ties=\{"tie_word_embeddings": False\}$'
    )
    t5 = {"model_type": "t5", TIED: True, SCALED: True, "transformers_version": "5.24.0"}
    with pytest.warns(tied_lora.WeightTyingWarning, match=expected % "save_params") as said:
        tied_lora.checkpoint.save_params(tmp_path / "tied", PARAMS, ties=t5)
    assert said[0].filename == __file__
    with pytest.warns(tied_lora.WeightTyingWarning, match=expected % "grow_vocabulary") as said:
        tied_lora.grow_vocabulary(PARAMS, 14, ties=t5)
    assert said[0].filename == __file__
    config = tied_lora.LoraConfig(r=2, target_modules=["shared"])
    groups = tied_lora.find_ties(PARAMS, t5)
    with pytest.warns(tied_lora.WeightTyingWarning, match=expected % "wrap") as said:
        tied_lora.wrap(PARAMS, config, ties=groups)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        declared = [("shared/embedding", "lm_head/kernel")]
        tied_lora.checkpoint.save_params(tmp_path / "declared", PARAMS, ties=declared)
        tied_lora.grow_vocabulary(PARAMS, 14, ties=declared)
        tied_lora.wrap(PARAMS, config, ties=declared)
        untied = {TIED: False}
        tied_lora.checkpoint.save_params(tmp_path / "untied", PARAMS, ties=untied)
        new, _ = tied_lora.grow_vocabulary(PARAMS, 14, ties=untied)
    np.testing.assert_array_equal(new["lm_head"]["kernel"][:, :12], PARAMS["lm_head"]["kernel"])


def test_an_untied_t5_is_exported_with_the_config_of_transformers_5(tmp_path):
    config = {
        "model_type": "t5", TIED: True, SCALED: False, "transformers_version": "5.24.0",
        "vocab_size": 12, "d_model": 8,
    }  # fmt: skip
    tied_lora.peft.save_merged(tmp_path / "merged", PARAMS, names_of(config), config)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written[TIED] is False
    assert written[SCALED] is False


def test_a_text_part_decides_in_transformers_4():
    fields = {
        "model_type": "llava",
        TIED: True,
        "text_config": {"model_type": "llama", TIED: False},
    }
    assert not is_tied(fields | {"transformers_version": "4.57.6"})
    assert is_tied(fields | {"transformers_version": "5.24.0"})
    assert is_tied(fields)  # of no release: what it says itself
    # A part that has another name is none for text: Blt's decoder of bytes.
    other = {"model_type": "blt", TIED: True, "decoder_config": {"model_type": "x", TIED: False}}
    assert is_tied(other | {"transformers_version": "4.57.6"})
