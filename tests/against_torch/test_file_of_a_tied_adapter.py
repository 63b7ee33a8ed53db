"""What PEFT writes for a tied adapter: the factors twice, and the base's embedding twice."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.against_torch.torch_models import VOCABULARY, WIDTH, leaf, tied

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def test_peft_stores_the_base_embedding_twice(pairs, tmp_path):
    """Pinned to see when it is fixed: in float32, 2 * V * D numbers beside r * (V + D)."""
    both = pairs["llama"]
    adapted, model = tied(both)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model."
    tables = [f"{start}model.embed_tokens", f"{start}lm_head"]
    base = [found.pop(f"{name}.base_layer.weight") for name in tables]
    assert [x.shape for x in base] == [(VOCABULARY, WIDTH)] * 2
    for x in base:
        np.testing.assert_array_equal(x, leaf(both.flax.params, both.kind.key))
    assert not [name for name in found if "base_layer" in name]
    # And the factors under both names, the head's swapped and transposed.
    pair = adapted.adapters["lora"][both.kind.key]
    for name, ours in (
        (f"{tables[0]}.lora_embedding_A", pair["lora_a"].T),
        (f"{tables[0]}.lora_embedding_B", pair["lora_b"].T),
        (f"{tables[1]}.lora_A.weight", pair["lora_b"]),
        (f"{tables[1]}.lora_B.weight", pair["lora_a"]),
    ):
        np.testing.assert_array_equal(found[name], ours, err_msg=name)
