"""What whole models of a user's own showed: methods that call methods, names by their end."""

from __future__ import annotations

import gc

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import SiteFilter
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, TiedLM, init, wrapped

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


@pytest.mark.parametrize(
    "scope",
    ["T/T.encode/encoder/shared", "T.encode/encoder/shared", "T/T.a/T.b/encoder/encoder.c/shared"],
)
def test_a_method_that_a_module_calls_of_itself_is_no_module(scope):
    assert SiteFilter(scope="T/encoder/shared")("lookup", scope)
    assert not SiteFilter(scope="T/T/encoder")("lookup", scope)
    assert SiteFilter(scope="a/a")("lookup", "T/a/a")  # a child of its parent's name


def test_modules_to_save_means_every_module_that_ends_so():
    """As ``str.endswith`` in PEFT: "norm" is "input_layernorm", too."""
    names = ["input_layernorm", "norm", "norms"]
    params = {"layers": {name: {"scale": jnp.ones(4)} for name in names}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["norm"]))
    expected = {"layers/input_layernorm/scale", "layers/norm/scale"}
    assert set(adapted.adapters["modules_to_save"]) == expected
    with pytest.raises(ValueError, match="modules_to_save='form' names no leaf"):
        tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["form"]))


def test_warnings_show_the_line_that_wraps():
    """A warning of `wrap` names the caller's file, and the collector runs again afterwards."""
    params = init(TiedLM())
    sites = tied_lora.trace(TiedLM().apply, {"params": params}, TOKENS)
    cases = [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": False},
        {"target_modules": ["up", "nothing"]},
        {"target_modules": ["up"], "rank_pattern": {"nothing": 3}},
    ]
    for fields in cases:
        config = tied_lora.LoraConfig(r=2, **fields)
        with pytest.warns(
            (tied_lora.UnmatchedTargetWarning, tied_lora.WeightTyingWarning)
        ) as caught:
            tied_lora.wrap(params, config, sites=sites)
        assert [w.filename for w in caught] == [__file__]
    assert gc.isenabled()
