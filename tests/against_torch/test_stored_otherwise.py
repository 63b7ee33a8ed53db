"""A model whose leaves are scaled, interleaved and padded, beside PEFT's of transformers' Llama."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import flax_tied_lora as tied_lora
from flax_tied_lora.names import from_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter, save_merged
from tests.against_torch.torch_models import LABELS, TOKENS, far, torch_logits, with_peft
from tests.helpers import maxtext_like as stored

CONFIG = transformers.LlamaConfig(
    vocab_size=stored.VOCABULARY, hidden_size=stored.WIDTH, num_hidden_layers=stored.LAYERS,
    num_attention_heads=stored.HEADS, num_key_value_heads=stored.KEY_HEADS,
    head_dim=stored.HEAD_DIM, intermediate_size=stored.HIDDEN, rms_norm_eps=stored.EPSILON,
    rope_theta=stored.THETA, tie_word_embeddings=True, max_position_embeddings=16,
)  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Targets here, and what PEFT calls them.
OURS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", *ATTENTION], "ensure_weight_tying": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "pissa": {"target_modules": ATTENTION, "init_lora_weights": "pissa"},
    "rows": {"target_modules": ATTENTION, "trainable_token_indices": [3, 95, 40]},
    "copy": {
        "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore::flax_tied_lora._planning.tying.WeightTyingWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.15 * torch.randn(weight.shape)
    return model.state_dict()


@pytest.fixture(scope="module")
def params(state) -> Any:
    """The same model here: read from PyTorch's state dict."""
    arrays = {name: x.numpy() for name, x in state.items()}
    return jax.tree.map(jnp.asarray, from_state_dict(arrays, stored.shapes(), stored.NAMES))


@pytest.fixture(scope="module")
def sites(params) -> tied_lora.CallSites:
    return tied_lora.trace(stored.logits, params, TOKENS)


def there(state: Any) -> Any:
    model = transformers.LlamaForCausalLM(CONFIG)
    model.load_state_dict(state)
    return model.eval()


def wrapped(params: Any, sites: Any, **fields: Any) -> tied_lora.Adapted:
    targets = [OURS.get(t, "token_embedder") for t in fields["target_modules"]]
    fields |= {"target_modules": targets} | (
        {"modules_to_save": ["token_embedder"]} if "modules_to_save" in fields else {}
    )
    return tied_lora.wrap(params, tied_lora.LoraConfig(r=4, **fields), sites=sites)


def trained(adapted: tied_lora.Adapted) -> tied_lora.Adapted:
    """Returns the adapters after steps; no gradient reaches what is padding."""
    apply = tied_lora.adapt(stored.logits)

    def loss(adapters: Any) -> Any:
        found = apply(adapted.replace(adapters=adapters), TOKENS)
        return -jnp.take_along_axis(jax.nn.log_softmax(found), LABELS[..., None], -1).mean()

    adapters, grad = adapted.adapters, jax.jit(jax.grad(loss))
    for _ in range(3):
        adapters = jax.tree.map(lambda x, g: x - 0.02 * jnp.sign(g), adapters, grad(adapters))
    return adapted.replace(adapters=adapters)


def test_the_two_models_are_one(state, params):
    assert params["token_embedder"]["embedding"].shape == (stored.PADDED, stored.WIDTH)
    assert far(torch_logits(there(state)).detach(), stored.logits(params, TOKENS)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_from_here_to_there_and_back(kind, state, params, sites, tmp_path):
    adapted = trained(wrapped(params, sites, **KINDS[kind]))
    ours = tied_lora.adapt(stored.logits)(adapted, TOKENS)
    save_adapter(tmp_path, adapted, stored.NAMES)
    theirs = peft.PeftModel.from_pretrained(there(state), tmp_path).eval()
    np.testing.assert_allclose(torch_logits(theirs).detach(), ours, atol=1e-4)
    assert far(ours, stored.logits(params, TOKENS)) > 0.01

    again = load_adapter(tmp_path, params, stored.NAMES, sites=sites)
    found, expected = (jax.tree.leaves(a.adapters) for a in (again, adapted))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, 1e-6, 1e-7)


@pytest.mark.parametrize("kind", ["lora", "dora", "rows", "copy"])
def test_from_there_to_here(kind, state, params, sites, tmp_path):
    theirs = with_peft(there(state), r=4, **KINDS[kind]).train()
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        labels = torch.from_numpy(LABELS).long()
        torch.nn.functional.cross_entropy(
            torch_logits(theirs).flatten(0, 1), labels.flatten()
        ).backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path)
    adapted = load_adapter(tmp_path, params, stored.NAMES, sites=sites)
    ours = tied_lora.adapt(stored.logits)(adapted, TOKENS)
    np.testing.assert_allclose(torch_logits(theirs).detach(), ours, atol=1e-4)
    assert far(ours, stored.logits(params, TOKENS)) > 0.01


def test_a_merged_model(state, params, sites, tmp_path):
    adapted = trained(wrapped(params, sites, **KINDS["lora"]))
    save_merged(tmp_path, adapted, stored.NAMES, CONFIG)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ours = tied_lora.adapt(stored.logits)(adapted, TOKENS)
    np.testing.assert_allclose(torch_logits(model).detach(), ours, atol=1e-4)
