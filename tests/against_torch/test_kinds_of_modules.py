"""Tables whose leaves other libraries call otherwise: PEFT serves the adapter that was saved."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import save_adapter
from tests.against_torch.torch_models import TOKENS, VOCABULARY, WIDTH

CONFIG = transformers.LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=4, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("said", ["by call sites", "by the table"])
@pytest.mark.parametrize("name", ["embeddings", "weight", "kernel", "embedding"])
def test_a_table_is_an_embedding_whatever_it_is_called(name, said, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    table = model.model.embed_tokens.weight.detach().numpy().copy()
    params = {"token_embedding": {name: jnp.asarray(table)}}
    sites = kind = None
    if said == "by the table":
        kind = "embedding"
    else:
        sites = tied_lora.trace(lambda p: p["token_embedding"][name][TOKENS], params)
    config = tied_lora.LoraConfig(r=2, target_modules=["token_embedding"], init_lora_weights=False)
    adapted = tied_lora.wrap(params, config, sites=sites)
    line = (f"token_embedding/{name}", "model.embed_tokens.weight", "v d -> v d", kind)
    save_adapter(tmp_path, adapted, names_of(None, [line]))
    theirs: Any = peft.PeftModel.from_pretrained(model, tmp_path)
    found = theirs.base_model.model.model.embed_tokens(torch.from_numpy(TOKENS).long())
    merged = np.asarray(tied_lora.merge(adapted)["token_embedding"][name])
    np.testing.assert_allclose(found.detach(), merged[TOKENS], atol=1e-4)
    assert np.abs(merged - table).max() > 0.1
