"""Greedy continuation: what it reads, where it stops, how often it compiles."""

from __future__ import annotations

import generation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<end>", "zero", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


class Counting:
    """A model of one matrix, the logits of the token after each token, that counts its traces."""

    def __init__(self):
        self.traces = []

    def __call__(self, params, tokens):
        self.traces.append(tokens.shape)
        return params["next"][tokens]


def bigram(**following: str) -> dict[str, jax.Array]:
    table = np.zeros((len(WORDS), len(WORDS)), np.float32)
    for word, after in following.items():
        table[WORDS.index(word), WORDS.index(after)] = 1
    return {"next": jnp.asarray(table)}


def test_continues_with_the_most_likely_token(tokenizer):
    params = bigram(one="two", two="three", three="one")
    text = generation.generate(Counting(), params, tokenizer, "zero one", max_new_tokens=4)
    assert text == "two three one two"


def test_stops_before_an_end_token(tokenizer):
    params = bigram(one="two", two="<end>")
    assert generation.generate(Counting(), params, tokenizer, "one", max_new_tokens=9) == "two"


def test_compiles_once_and_reads_params_anew(tokenizer):
    model = Counting()
    up = bigram(one="two", two="three", three="four", four="one")
    down = bigram(one="four", four="three", three="two", two="one")
    assert generation.generate(model, up, tokenizer, "one", 3) == "two three four"
    # Another prompt length and other values: the same program, nothing baked in.
    assert generation.generate(model, down, tokenizer, "two one", 3) == "four three two"
    assert model.traces == [(1, 64)]


def test_a_window_of_any_length(tokenizer):
    params = bigram(one="one")
    model = Counting()
    text = generation.generate(model, params, tokenizer, "one", max_new_tokens=127)
    assert text.split() == ["one"] * 127
    assert model.traces == [(1, 128)]


def test_no_new_tokens(tokenizer):
    assert generation.generate(Counting(), bigram(), tokenizer, "one", max_new_tokens=0) == ""


def test_an_empty_prompt(tokenizer):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generation.generate(Counting(), bigram(), tokenizer, "")


def test_encode(tokenizer):
    tokens = generation.encode(tokenizer, "one four")
    np.testing.assert_array_equal(tokens, [2, 5])
    assert tokens.dtype == np.int32
