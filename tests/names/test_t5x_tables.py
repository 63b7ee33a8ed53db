"""Tables of T5X's families: there and back, scanned or not, configs that are known.

`tests/libraries/` compares models under these names with PyTorch's.
"""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from flax_tied_lora.names import from_state_dict, names_of, to_state_dict
from tests.libraries.t5x_like import shapes


@pytest.mark.parametrize(("family", "scanned"), [("t5", False), ("umt5", False), ("umt5", True)])
def test_there_and_back(family, scanned):
    numbers = np.random.default_rng(0)
    like = shapes(family, scanned)
    params = jax.tree.map(lambda x: numbers.standard_normal(x.shape).astype(np.float32), like)
    fields = {"scan_layers": scanned, "logits_via_embedding": True}
    names = names_of({"model_type": f"t5x/{family}", **fields})
    state = to_state_dict(params, names)
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(state, params, names), params)
    biases = [n for n in state if n.endswith("relative_attention_bias.weight")]
    assert len(biases) == (2 if family == "t5" else 4)
    assert dict(names.tied) == {
        "token_embedder/embedding": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }


def test_a_name_alone_is_the_untied_model():
    names = names_of("t5x/t5")
    assert names.to_flax("lm_head.weight")[0] == "decoder/logits_dense/kernel"
    assert names.tied["token_embedder/embedding"] == (
        "encoder.embed_tokens",
        "decoder.embed_tokens",
    )


def test_the_scanned_axis_is_where_the_config_says():
    names = names_of({"model_type": "t5x/umt5", "param_scan_axis": 0})
    weights = names.to_torch("decoder/decoder/mlp/wo/kernel", (2, 24, 16))
    assert [w.part for w in weights] == [((0, 0),), ((0, 1),)]


@pytest.mark.parametrize(("example", "family"), [("t5", "t5x/t5"), ("scalable_t5", "t5x/umt5")])
def test_a_config_of_t5x_names_its_family(example, family):
    where = f"t5x.examples.{example}.network"
    kind = type("T5Config", (types.SimpleNamespace,), {"__module__": where})
    assert names_of(kind(logits_via_embedding=True)).family == family
    with pytest.raises(ValueError, match="no table of names for the family 't5x/decoder_only'"):
        names_of(type("Config", (), {"__module__": "t5x.examples.decoder_only.network"})())
