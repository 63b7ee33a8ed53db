"""Merged models that PyTorch loads: the same logits, one table, nothing missing or left over."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora._peft.merged.export import save_merged
from flax_tied_lora.names import names_of, to_state_dict
from tests.against_torch.test_names_torch import (
    BODY,
    MAPPED,
    TORCH,
    clip_of_old_jax,  # noqa: F401 - a fixture, for all tests here
    config_of,
)
from tests.against_torch.torch_models import far, perturbed
from tests.helpers.name_tables import TUNIX, tunix_names
from tests.models.families import FAMILIES, TOKENS, random_weights

pytestmark = pytest.mark.models
MASKED = ("bert", "roberta")


class Case:
    """A family's Flax model with random weights, its call sites, and its class in PyTorch."""

    def __init__(self, name: str, **fields: Any):
        self.family = FAMILIES[name]
        self.config = config_of(name, **fields)
        self.config.architectures = [self.family.model]
        kind = "Flax" + self.family.model.removeprefix("Flax")
        self.model = getattr(transformers, kind)(self.config, _do_init=False)
        self.params = random_weights(self.model.params_shape_tree)
        self.sites = tied_lora.trace(self.call, self.params)
        self.auto = transformers.AutoModelForCausalLM
        if self.family.encodes:
            self.auto = transformers.AutoModelForSeq2SeqLM
        elif name in MASKED:
            self.auto = transformers.AutoModelForMaskedLM

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"decoder_input_ids": TOKENS[:, ::-1].copy()} if self.family.encodes else {}

    def call(self, params: Any) -> Any:
        mode, value = self.family.mode
        return self.model(TOKENS, params=params, **self.inputs, **{mode: value}).logits

    def wrap(self, **fields: Any) -> tied_lora.Adapted:
        config = tied_lora.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
        adapted = tied_lora.wrap(
            self.params, config, sites=self.sites, ties=self.family.ties, rng=jax.random.key(1)
        )
        return perturbed(adapted)

    def load(self, folder: Any) -> Any:
        """Returns PyTorch's model, for which the files have what it needs and nothing else."""
        model, info = self.auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return model.eval()

    def torch_logits(self, model: Any) -> Any:
        inputs = {name: torch.from_numpy(x) for name, x in self.inputs.items()}
        with torch.no_grad():
            return model(torch.from_numpy(TOKENS), **inputs).logits


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def stored(folder: Any) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def fields_of(family: Any, kind: str) -> dict[str, Any]:
    table = family.targets[0]
    attention = list(family.attention)
    return {
        "lora": {"target_modules": [table, *attention]},
        "dora": {"target_modules": [table, *attention], "use_dora": True, "bias": "lora_only"},
        "tokens": {"target_modules": attention, "trainable_token_indices": {table: [3, 95, 40]}},
        "save": {"target_modules": attention, "modules_to_save": [table], "bias": "all"},
    }[kind]


@pytest.mark.parametrize("kind", ["lora", "dora", "tokens", "save"])
@pytest.mark.parametrize("name", MAPPED)
def test_pytorch_computes_what_the_adapted_model_does(name, kind, tmp_path):
    mine = case(name)
    adapted = mine.wrap(**fields_of(mine.family, kind))
    expected = tied_lora.adapt(mine.call)(adapted)
    save_merged(tmp_path, adapted, names_of(mine.config), mine.config)

    model = mine.load(tmp_path)
    found = mine.torch_logits(model)
    assert far(found, expected) < 1e-4
    assert far(expected, mine.call(tied_lora.base(adapted))) > 1e-2
    table = model.get_input_embeddings().weight
    assert table.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    tied = {n for n, x in model.state_dict().items() if x.data_ptr() == table.data_ptr()}
    assert len(tied) > 1
    assert len(tied & set(stored(tmp_path))) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert config["architectures"] == [mine.family.model.removeprefix("Flax")]


def test_bfloat16_is_rounded_once_and_read_as_such(tmp_path):
    mine = case("gemma")
    adapted = mine.wrap(**fields_of(mine.family, "lora"))
    save_merged(tmp_path, adapted, names_of(mine.config), mine.config.to_dict(), dtype="bfloat16")
    model, info = mine.auto.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    expected = to_state_dict(tied_lora.merge(adapted), names_of(mine.config))
    for name, x in model.named_parameters():
        rounded = torch.from_numpy(np.array(expected[name])).to(torch.bfloat16)
        assert torch.equal(x.detach(), rounded), name


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bart"])
def test_separate_adapters_are_two_tables_in_pytorch(name, tmp_path):
    mine = case(name)
    targets = [mine.family.targets[0], "lm_head", *mine.family.attention]
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = mine.wrap(target_modules=targets, ensure_weight_tying=False)
    names, untie = names_of(mine.config), {"lm_head": "lm_head/kernel"}
    with pytest.raises(ValueError, match="separate adapters"):
        save_merged(tmp_path, adapted, names, mine.config)
    assert not list(tmp_path.iterdir())
    save_merged(tmp_path, adapted, names, mine.config, untie=untie)

    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    model = mine.load(tmp_path)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.data_ptr() != head.data_ptr()
    assert far(table.detach(), head.detach()) > 0.1
    expected = tied_lora.adapt(mine.call)(adapted)
    assert far(mine.torch_logits(model), expected) < 1e-4


def test_t5_cannot_be_untied(tmp_path):
    """Its logits are scaled where it is tied, and only there."""
    mine = case("t5")
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = mine.wrap(target_modules=["shared", "lm_head"], ensure_weight_tying=False)
    with pytest.raises(ValueError, match="scales its logits where it is tied"):
        save_merged(
            tmp_path,
            adapted,
            names_of(mine.config),
            mine.config,
            untie={"lm_head": "lm_head/kernel"},
        )


def test_an_untied_model_stays_untied(tmp_path):
    mine = Case("llama", tie_word_embeddings=False)
    config = tied_lora.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    adapted = perturbed(tied_lora.wrap(mine.params, config, sites=mine.sites, ties=mine.config))
    save_merged(tmp_path, adapted, names_of(mine.config), mine.config)
    model = mine.load(tmp_path)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert far(mine.torch_logits(model), tied_lora.adapt(mine.call)(adapted)) < 1e-4


# The reads of tunix's leaves: which axes are rows and which are columns.
READS = {
    "layers/0/attn/q_proj/w": "btd,dhk->bthk",
    "layers/0/attn/o_proj/w": "bthk,hkd->btd",
    "layers/0/attn/q_einsum/w": "btd,hdk->bthk",
    "layers/0/attn/kv_einsum/w": "btd,chdk->cbthk",
    "layers/0/attn/qkv_einsum/w": "btd,chdk->cbthk",
    "layers/0/attn/attn_vec_einsum/w": "bthk,hkd->btd",
    "layers/0/mlp/gate_proj": "btd,edf->btef",
    "layers/0/mlp/down_proj": "btef,efd->btd",
}


def reads(params: Any) -> Any:
    """Reads tunix's leaves as its models do, and makes some sum of them."""
    leaf = traverse_util.flatten_dict(params, sep="/")
    table = leaf["embedder/input_embedding"]
    x, total = table[TOKENS], 0.0
    for path, equation in READS.items():
        if path in leaf:
            sizes = dict(zip(equation.split("->")[0].split(",")[1], leaf[path].shape, strict=True))
            data = jnp.ones([sizes.get(n, 2) for n in equation.split(",")[0]])
            total += jnp.einsum(equation, data, leaf[path]).sum()
    return x @ table.T + total


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma3", "gemma3_fused"])
def test_tunix_s_models(kind, use_dora, tmp_path):
    names, shapes = tunix_names(kind), TUNIX[kind][2]
    flat = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    params = random_weights(traverse_util.unflatten_dict(flat, sep="/"))
    targets = [path for path in READS if path in shapes]
    config = tied_lora.LoraConfig(
        r=4, target_modules=["embedder/input_embedding", *targets], use_dora=use_dora
    )
    adapted = perturbed(tied_lora.wrap(params, config, sites=tied_lora.trace(reads, params)))
    assert len(adapted.plan.adapted) == 1 + len(targets) > 2

    model, config, fields = TORCH[kind]
    config = getattr(transformers, config)(**{**BODY, **fields, "num_experts_per_tok": 2})
    save_merged(tmp_path, adapted, names, config)
    expected = to_state_dict(tied_lora.merge(adapted), names)
    found = stored(tmp_path)
    assert set(found) == set(expected)
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)

    auto = transformers.AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).__name__ == f"{model}ForCausalLM"
    reference = getattr(transformers, type(loaded).__name__)(config).eval()
    tensors = to_state_dict(tied_lora.merge(adapted), names, duplicates=True)
    reference.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in tensors.items()})
    ids = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        assert far(loaded.eval()(ids).logits, reference(ids).logits) < 1e-5
    table, head = loaded.get_input_embeddings().weight, loaded.lm_head.weight
    assert (table.data_ptr() == head.data_ptr()) is (kind != "qwen3_moe")
