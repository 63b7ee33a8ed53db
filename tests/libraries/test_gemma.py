"""DeepMind's ``gemma``: adapted beside merged."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import flax_tied_lora as tied_lora
from flax_tied_lora.names import from_state_dict, names_of, to_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.libraries import comparing
from tests.libraries.comparing import (
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    TABLE,
    TOKENS,
    VOCABULARY,
    WIDTH,
    compiled,
    far,
)
from tests.libraries.gemma_models import FAMILIES, build

each_family = pytest.mark.parametrize("name", FAMILIES)
# What is compiled: all of them in `make test-libraries`.
each_compiled = comparing.each_of(FAMILIES, quick=["gemma3"])


@functools.cache
def adapted_of(name: str) -> tied_lora.Adapted:
    """The table and every projection."""
    case = build(name)
    return comparing.wrapped(case.logits, case.params, case.family.targets, TOKENS)


@each_family
def test_the_table_is_tied_with_nothing_declared(name):
    case = build(name)
    sites = tied_lora.trace(case.logits, case.params, TOKENS)
    assert [s.role for s in sites.of(TABLE)] == ["lookup", "projection"]
    ties = tied_lora.find_ties(case.params, sites=sites)
    assert [(g.key, g.paths, g.found) for g in ties] == [(TABLE, (TABLE,), ("data flow",))]


@each_family
def test_explain_shows_every_site_as_low_rank(name):
    case = build(name)
    explanation = tied_lora.explain(case.logits, adapted_of(name), TOKENS)
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} == {"low rank"}
    assert sorted(r.site.leaf for r in explanation.reads) == sorted(
        [TABLE, TABLE, *(f"layer_{i}/{leaf}" for i in range(2) for leaf in case.family.leaves)]
    )


@each_compiled
def test_logits_and_gradients_are_those_of_the_merged_model(name):
    comparing.assert_merged(build(name).logits, adapted_of(name), TOKENS)


@pytest.mark.slow
def test_bfloat16_logits_and_gradients_are_those_of_the_merged_model():
    case = build("gemma3")
    comparing.assert_merged_in_bfloat16_of(case, case.params, TOKENS)


@each_compiled
def test_decodes_what_the_merged_model_decodes(name):
    comparing.assert_decodes_merged(build(name), adapted_of(name), TOKENS, 4)


TORCH = {
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma2 fused": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
         "num_key_value_heads": HEADS},
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"], "rope_theta": 10_000},
    ),
}  # fmt: skip


@functools.cache
def torch_model(name: str) -> Any:
    kind, config, fields = TORCH[name]
    body = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "query_pre_attn_scalar": HEAD,
        "sliding_window": 4,
        "attn_implementation": "eager",
    }
    torch.manual_seed(3)
    model = kind(config(**{**body, **fields}))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return model.eval()


@each_compiled
def test_names_are_those_of_the_pytorch_model(name):
    """Its weights under these names give its logits."""
    case, model = build(name), torch_model(name)
    state = {n: x.detach().numpy() for n, x in model.state_dict().items()}
    names = names_of(case.model.config)
    params = from_state_dict(state, case.params, names)
    back = to_state_dict(params, names, duplicates=True)
    assert set(back) == set(state)
    for key, x in back.items():
        np.testing.assert_array_equal(x, state[key], err_msg=key)
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    assert far(compiled(case.logits)(params, TOKENS), expected) < 1e-5


@each_compiled
def test_peft_reads_the_adapter(name, tmp_path):
    case, model = build(name), torch_model(name)
    names = names_of(case.model.config)
    state = {n: x.detach().numpy() for n, x in model.state_dict().items()}
    params = from_state_dict(state, case.params, names)
    adapted = comparing.wrapped(case.logits, params, case.family.targets, TOKENS)
    save_adapter(tmp_path, adapted, names)
    again = load_adapter(
        tmp_path, params, names, sites=tied_lora.trace(case.logits, params, TOKENS)
    )
    for ours, back in zip(*map(jax.tree.leaves, (adapted.adapters, again.adapters)), strict=True):
        np.testing.assert_array_equal(ours, back)

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    found = compiled(tied_lora.adapt(case.logits, on_dense="error"))(adapted, TOKENS)
    assert far(found, expected) < 1e-5
