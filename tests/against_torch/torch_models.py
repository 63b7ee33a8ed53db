"""Tiny tied models in PyTorch and in Flax, with the same weights, and PEFT's factors as ours."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers

import flax_tied_lora as tied_lora

VOCABULARY, WIDTH = 96, 32
# How PEFT warns where a tied layer is adapted without ensure_weight_tying.
NOT_ENSURED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(0, VOCABULARY, (3, 9)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model that both libraries have.

    Attributes:
      torch, flax: names of its classes in transformers.
      config: its config.
      table: PyTorch's name of the input embedding.
      tied_target: a target that makes PEFT tie the adapters of embedding and head.
      projections: targets that name attention projections.
      ties: what has to be declared of the Flax model.
    """

    torch: str
    flax: str
    config: Any
    table: str
    tied_target: str
    projections: tuple[str, ...]
    ties: Any = "auto"

    @property
    def key(self) -> str:
        """The tie group of the table."""
        return self.table.replace(".", "/") + "/embedding"


KINDS = {
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "FlaxGPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ),
        "transformer.wte",
        # By PEFT's list of names only embed_tokens and lm_head are embeddings, wte is none.
        "lm_head",
        ("c_attn", "attn.c_proj"),
    ),
    "llama": Kind(
        "LlamaForCausalLM",
        "FlaxLlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, max_position_embeddings=16,
            tie_word_embeddings=True,
        ),
        "model.embed_tokens",
        "embed_tokens",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        [("model/embed_tokens/embedding", "lm_head/kernel")],
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model twice."""

    kind: Kind
    folder: Path
    flax: Any
    sites: tied_lora.CallSites

    def torch(self) -> Any:
        """Returns the PyTorch model, read anew: PEFT changes the one that it is given."""
        return getattr(transformers, self.kind.torch).from_pretrained(self.folder).eval()

    def logits(self, params: Any) -> Any:
        """Returns the Flax model's logits."""
        return self.flax(TOKENS, params=params, train=False).logits

    def wrap(self, **fields: Any) -> tied_lora.Adapted:
        """Returns the Flax model's params, wrapped."""
        config = tied_lora.LoraConfig(**fields)
        return tied_lora.wrap(self.flax.params, config, sites=self.sites, ties=self.kind.ties)


def pair(name: str, folder: Path) -> Pair:
    """Returns a model in PyTorch, with random weights, and its conversion to Flax."""
    kind = KINDS[name]
    torch.manual_seed(11)
    model = getattr(transformers, kind.torch)(kind.config)
    with torch.no_grad():
        for weight in model.parameters():
            # Larger than a new model's, so that attention is not all but uniform.
            weight += 0.15 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    flax = getattr(transformers, kind.flax).from_pretrained(folder, from_pt=True)
    flax_call = lambda params, tokens: flax(tokens, params=params, train=False).logits  # noqa: E731
    return Pair(kind, folder, flax, tied_lora.trace(flax_call, flax.params, TOKENS))


@contextlib.contextmanager
def peft_warnings(*expected: str) -> Iterator[None]:
    """Fails unless PEFT gives exactly the warnings that start so, Conv1D's layout aside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(w.message) for w in caught if "fan_in_fan_out" not in str(w.message)]
    assert len(found) == len(expected), found
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start), text


def with_peft(model: Any, *expected_warnings: str, **fields: Any) -> Any:
    """Returns a PyTorch model with PEFT's adapters."""
    torch.manual_seed(13)
    with peft_warnings(*expected_warnings):
        return peft.get_peft_model(model, peft.LoraConfig(**fields))


def torch_layer(model: Any, key: str) -> Any:
    """Returns PEFT's layer for one of our group keys."""
    return model.base_model.model.get_submodule(key.rpartition("/")[0].replace("/", "."))


def copy_factors(adapted: tied_lora.Adapted, model: Any) -> None:
    """Puts our factors into PEFT's layers."""
    with torch.no_grad():
        for key, pair in adapted.adapters["lora"].items():
            for ours, theirs in _factors(torch_layer(model, key)).items():
                assert theirs.shape == pair[ours].shape[::-1], (key, ours)
                theirs.copy_(torch.from_numpy(np.array(pair[ours].T)))


def _factors(layer: Any) -> dict[str, torch.Tensor]:
    if isinstance(layer, peft.tuners.lora.Embedding):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"lora_a": a, "lora_b": b}


def factors(layer: Any) -> dict[str, np.ndarray]:
    """Returns the factors of one of PEFT's layers in our layout."""
    return {name: x.detach().numpy().T for name, x in _factors(layer).items()}


def gradients(layer: Any) -> dict[str, np.ndarray]:
    """Returns the gradients of one of PEFT's layers in our layout."""
    return {name: x.grad.numpy().T for name, x in _factors(layer).items()}


def perturbed(adapted: tied_lora.Adapted, deviation: float = 0.3) -> tied_lora.Adapted:
    """Returns a copy with random factors, so that no delta is zero."""
    rng = np.random.default_rng(5)
    return adapted.replace(
        adapters=jax.tree.map(
            lambda x: jax.numpy.asarray(deviation * rng.standard_normal(x.shape), x.dtype),
            adapted.adapters,
        )
    )


def far(found: Any, expected: Any) -> float:
    """Returns the distance of two arrays, relative to the second one's norm."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def torch_logits(model: Any) -> torch.Tensor:
    return model(torch.from_numpy(TOKENS).long()).logits


def tied(both: Pair, **fields: Any) -> tuple[tied_lora.Adapted, Any]:
    """The table and the attention projections, adapted here and there, with equal factors."""
    kind = both.kind
    fields = {"r": 4, "lora_alpha": 6, **fields}
    ours = [kind.table.rpartition(".")[2], *kind.projections]
    adapted = perturbed(both.wrap(target_modules=[t.replace(".", "/") for t in ours], **fields))
    theirs = [kind.tied_target, *kind.projections]
    model = with_peft(both.torch(), target_modules=theirs, ensure_weight_tying=True, **fields)
    copy_factors(adapted, model)
    return adapted, model


def leaf(params: Any, key: str) -> Any:
    for part in key.split("/"):
        params = params[part]
    return params
