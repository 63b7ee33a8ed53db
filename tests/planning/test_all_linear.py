""" "all-linear": which leaves it takes, and which is the output layer that it leaves out."""

from __future__ import annotations

import flax.linen as nn

import flax_tied_lora as tied_lora
from tests.helpers.deep_model import SITES, TABLE, Deep, adapted_keys, kernels
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, StackedLM, init


def test_all_linear_leaves_a_tied_table_out():
    assert adapted_keys("all-linear", sites=SITES) == kernels("q_proj") | kernels("v_proj")
    assert adapted_keys("All-Linear", sites=SITES) == kernels("q_proj") | kernels("v_proj")


def test_all_linear_leaves_an_untied_output_projection_out():
    model = Deep(tied=False)
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    expected = kernels("q_proj") | kernels("v_proj")
    assert adapted_keys("all-linear", params, sites) == expected
    declared = [(TABLE, "lm_head/kernel")]
    assert adapted_keys("all-linear", params, sites, ties=declared) == expected


def test_all_linear_takes_a_second_head_beside_a_tied_table():
    """Of as many columns as a table has rows: it was taken for the output projection."""

    class TwoHeads(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(VOCAB, WIDTH, name="embed_tokens")
            x = embed(tokens) + nn.Embed(2, WIDTH, name="token_types")(tokens % 2)
            return embed.attend(x), nn.Dense(2, name="next_sentence")(x)

    model = TwoHeads()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    assert adapted_keys("all-linear", params, sites) == {"next_sentence/kernel"}


def test_all_linear_of_stacked_attention():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    layer = "layers/layer"
    assert adapted_keys("all-linear", params, sites) == {
        f"{layer}/q_proj/kernel", f"{layer}/o_proj/kernel"
    }  # fmt: skip


def test_all_linear_with_exclusions():
    keys = adapted_keys("all-linear", sites=SITES, exclude_modules=["v_proj", "layers_0.q_proj"])
    assert keys == kernels("q_proj", [1, 2])
