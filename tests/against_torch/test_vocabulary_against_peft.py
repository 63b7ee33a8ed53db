"""Adapters of models with added tokens, in PEFT's files: to PyTorch and back, the logits the same.

PyTorch's model is resized by transformers' own ``resize_token_embeddings``, which draws other new
rows than ours: they agree only if the file brings them along.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter, save_merged
from tests.against_torch.round_trip import model as family_model
from tests.against_torch.torch_models import VOCABULARY, Pair, far, perturbed
from tests.helpers.damage import CONFIG, WEIGHTS

pytestmark = pytest.mark.models
N_TOKENS, MULTIPLE = VOCABULARY + 3, 8
TOKENS = np.array([[1, 96, 5, 97, 2], [98, 7, 96, 3, 98]], np.int32)
NEW = [96, 97, 98]


def table_name(both: Pair) -> str:
    return both.kind.table.rpartition(".")[2]


# What is trained, in PEFT's words; True: on the table and tied in PEFT.
CASES: dict[str, Any] = {
    "new rows": lambda both: {"trainable_token_indices": NEW},
    "nothing of the table": lambda both: {},
    "factors": lambda both: {"ensure_weight_tying": True},
    "a copy": lambda both: {
        "ensure_weight_tying": True,
        "modules_to_save": ["embed_tokens" if both.kind.table.startswith("model") else "lm_head"],
    },
}


class Grown:
    """A pair of models with three tokens more, padded to a multiple of 8."""

    def __init__(self, both: Pair):
        self.both = both
        self.params, self.vocabulary = tied_lora.grow_vocabulary(
            both.flax.params, N_TOKENS, pad_to_multiple_of=MULTIPLE, ties=both.kind.ties
        )
        fields = both.kind.config.to_dict() | {"vocab_size": self.vocabulary.size}
        self.config = type(both.kind.config)(**fields)
        self.flax = getattr(transformers, both.kind.flax)(self.config, _do_init=False)
        self.names = names_of(self.config)
        self.logits = tied_lora.adapt(lambda p: self.flax(TOKENS, params=p, train=False).logits)

    def wrap(self, **fields: Any) -> tied_lora.Adapted:
        config = tied_lora.LoraConfig(r=4, lora_alpha=6, **fields)
        return tied_lora.wrap(self.params, config, sites=self.both.sites, ties=self.both.kind.ties)

    def torch(self) -> Any:
        model = self.both.torch()
        torch.manual_seed(29)
        model.resize_token_embeddings(N_TOKENS, pad_to_multiple_of=MULTIPLE)
        return model


@pytest.fixture(scope="module")
def models(pairs) -> dict[str, Grown]:
    return {name: Grown(both) for name, both in pairs.items()}


# GPT-2's names are other ones than those that PEFT knows; new rows and factors show it.
BOTH = [("llama", case) for case in CASES] + [("gpt2", case) for case in ("new rows", "factors")]


def targets(grown: Grown, case: str, there: bool) -> list[str]:
    kind = grown.both.kind
    table = [kind.tied_target if there else table_name(grown.both)] if case == "factors" else []
    return [*table, *kind.projections]


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def read_there(grown: Grown, folder: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_logits(peft.PeftModel.from_pretrained(grown.torch(), folder).eval())


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_our_file_in_peft(models, name, case, tmp_path):
    grown = models[name]
    fields = CASES[case](grown.both)
    adapted = grown.wrap(target_modules=targets(grown, case, there=False), **fields)
    adapted = perturbed(adapted, 0.2)
    save_adapter(tmp_path, adapted, grown.names, save_embedding_layers=True)
    ours = grown.logits(adapted)
    assert far(read_there(grown, tmp_path), ours) < 1e-4
    tables = [
        n for n, x in load_file(tmp_path / WEIGHTS).items()
        if x.shape == (grown.vocabulary.size, 32) and "modules_to_save" not in n
    ]  # fmt: skip
    copies = case == "a copy"
    assert len(tables) == (2 if copies else 1), tables  # a copy is there for each of its modules
    again = load_adapter(
        tmp_path, grown.params, grown.names, sites=grown.both.sites, ties=grown.both.kind.ties
    )
    assert far(grown.logits(again), ours) < 1e-6


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_a_file_of_peft_here(models, name, case, tmp_path):
    grown = models[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets(grown, case, there=True),
        **CASES[case](grown.both),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(grown.torch(), config).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in theirs.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn(weight.shape)
        theirs.peft_config["default"].base_model_name_or_path = str(grown.both.folder)
        theirs.save_pretrained(tmp_path)  # "auto": the vocabulary is not that of the folder
    options = {"sites": grown.both.sites, "ties": grown.both.kind.ties}
    if case != "a copy":
        with pytest.raises(AdapterFileError, match='base_embeddings="load"'):
            load_adapter(tmp_path, grown.params, grown.names, **options)
    adapted = load_adapter(tmp_path, grown.params, grown.names, base_embeddings="load", **options)
    assert far(grown.logits(adapted), torch_logits(theirs)) < 1e-4
    if name == "llama":  # whose head is a leaf of its own, which has to follow
        merged = tied_lora.merge(adapted)
        table = merged["model"]["embed_tokens"]["embedding"]
        assert jnp.array_equal(merged["lm_head"]["kernel"], table.T)
    with pytest.raises(AdapterFileError, match=r"grow_vocabulary\(params, "):
        load_adapter(
            tmp_path, grown.both.flax.params, grown.names, base_embeddings="load", **options
        )


def test_auto_goes_by_the_folder_of_the_base(models, tmp_path):
    grown = models["llama"]
    adapted = grown.wrap(target_modules=list(grown.both.kind.projections))

    def tables(folder: Any, **options: Any) -> int:
        save_adapter(folder, adapted, grown.names, overwrite=True, **options)
        return sum(
            x.shape[0] == grown.vocabulary.size for x in load_file(folder / WEIGHTS).values()
        )

    assert tables(tmp_path / "a", base_model_name_or_path=str(grown.both.folder)) == 1
    assert tables(tmp_path / "a", base_model_name_or_path="someone/else") == 0
    same = tmp_path / "same"
    same.mkdir()
    (same / "config.json").write_text(json.dumps({"vocab_size": grown.vocabulary.size}))
    assert tables(tmp_path / "a", base_model_name_or_path=str(same)) == 0
    (same / "config.json").write_text("{")
    assert tables(tmp_path / "a", base_model_name_or_path=str(same)) == 0
    with pytest.raises(ValueError, match="save_embedding_layers='yes'; expected True, False"):
        save_adapter(tmp_path / "b", adapted, grown.names, save_embedding_layers="yes")
    assert not (tmp_path / "b").exists()


def test_a_merged_model(models, tmp_path):
    grown = models["gpt2"]
    fields = {"trainable_token_indices": NEW}
    adapted = perturbed(grown.wrap(target_modules=targets(grown, "factors", False), **fields), 0.2)
    with pytest.raises(ValueError, match="vocab_size is 96"):
        save_merged(tmp_path, adapted, grown.names, grown.both.kind.config)
    save_merged(tmp_path, adapted, grown.names, grown.config)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == grown.vocabulary.size
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(x.shape == (grown.vocabulary.size, 32) for x in stored.values()) == 1
    there = getattr(transformers, grown.both.kind.torch).from_pretrained(tmp_path).eval()
    assert far(torch_logits(there), grown.logits(adapted)) < 1e-4


def test_biases_of_the_logits(tmp_path):
    """BERT's output has a bias for each token, which grows and goes into the file, too."""
    mine = family_model("bert")
    params, vocabulary = tied_lora.grow_vocabulary(mine.params, N_TOKENS, ties=mine.family.ties)
    config = type(mine.config)(**{**mine.config.to_dict(), "vocab_size": vocabulary.size})
    flax = type(mine.flax)(config, _do_init=False)
    logits = tied_lora.adapt(lambda p: flax(TOKENS, params=p, train=False).logits)
    # Trained rows would not do: PEFT 0.21.2 leaves out the bias of an output projection with them.
    own = tied_lora.LoraConfig(r=4, target_modules=["query"])
    adapted = perturbed(tied_lora.wrap(params, own, sites=mine.sites, ties=mine.family.ties), 0.2)
    save_adapter(tmp_path, adapted, mine.names, save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = mine.torch()
        base.resize_token_embeddings(N_TOKENS)
        there = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ours = logits(adapted)
    assert far(torch_logits(there), ours) < 1e-4
    other, _ = tied_lora.grow_vocabulary(
        mine.params, N_TOKENS, ties=mine.family.ties, init=jax.nn.initializers.normal(1.0)
    )
    options = {"sites": mine.sites, "ties": mine.family.ties}
    with pytest.raises(AdapterFileError, match="base_embeddings"):
        load_adapter(tmp_path, other, mine.names, **options)
    again = load_adapter(tmp_path, other, mine.names, base_embeddings="load", **options)
    assert far(logits(again), ours) < 1e-6
    assert jnp.array_equal(again.params["cls"]["predictions"]["bias"],
                           params["cls"]["predictions"]["bias"])  # fmt: skip


def test_the_config_names_the_new_rows(models, tmp_path):
    grown = models["llama"]
    adapted = grown.wrap(target_modules=[], trainable_token_indices=grown.vocabulary.new_tokens)
    save_adapter(tmp_path, adapted, grown.names)
    assert json.loads((tmp_path / CONFIG).read_text())["trainable_token_indices"] == NEW
    assert len(load_file(tmp_path / WEIGHTS)) == 1
