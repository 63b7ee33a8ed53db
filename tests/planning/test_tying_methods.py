"""An adapter of one scope of a tied table, in a model whose methods call one another."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, init, wrapped

OTHERS = np.array([[7, 8, 1], [2, 2, 9]], np.int32)


class Stack(nn.Module):
    """A shared embedding and one layer."""

    shared: nn.Module

    @nn.compact
    def __call__(self, tokens):
        x = self.shared(tokens)
        return x + jnp.tanh(nn.Dense(WIDTH, name="up")(x))


class EncoderDecoder(nn.Module):
    """One table for encoder, decoder and logits; `__call__` calls the model's other methods."""

    def setup(self):
        self.shared = nn.Embed(VOCAB, WIDTH)
        self.encoder = Stack(self.shared)
        self.decoder = Stack(self.shared)

    def encode(self, tokens):
        return self.encoder(tokens)

    def decode(self, encoded, tokens):
        return self.shared.attend(self.decoder(tokens) + encoded)

    def __call__(self, tokens, others):
        return self.decode(self.encode(tokens), others)


MODEL = EncoderDecoder()


def whole(params):
    return MODEL.apply({"params": params}, TOKENS, OTHERS)


def encode(params):
    return MODEL.apply({"params": params}, TOKENS, method="encode")


def decode(params, encoded):
    return MODEL.apply({"params": params}, encoded, OTHERS, method="decode")


@pytest.mark.filterwarnings("ignore::flax_tied_lora.UnreadTargetWarning")
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["encoder/shared", "decoder/shared"])
def test_an_adapter_of_a_scope_is_there_in_each_method(field, name):
    params = init(MODEL, TOKENS, OTHERS)
    sites = tied_lora.trace(whole, params)
    config = {"target_modules": None, field: [name], "ensure_weight_tying": False}
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = wrapped(params, config.pop("target_modules"), sites=sites, **config)
    expected = tied_lora.adapt(whole)(adapted)
    encoded = tied_lora.adapt(encode)(adapted)
    assert jnp.array_equal(tied_lora.adapt(decode)(adapted, encoded), expected)
    assert jnp.array_equal(encoded, encode(params)) == (name == "decoder/shared")
