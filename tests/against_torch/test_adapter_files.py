"""Files that PEFT and transformers write, read here; files written here, read by them."""

from __future__ import annotations

import json
import warnings

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers

from flax_tied_lora._peft.adapter.folder import AdapterFileError, read_adapter, write_adapter
from flax_tied_lora._peft.files.safetensors_read import open_safetensors
from flax_tied_lora._peft.files.safetensors_write import write_safetensors
from tests.against_torch.torch_models import torch_logits, with_peft
from tests.helpers.damage import CONFIG, WEIGHTS, snapshot

pytestmark = pytest.mark.models
DTYPES = {
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def adapted(both, **fields):
    """Returns a model with PEFT's adapters, none of them zero."""
    fields = {"r": 3, "target_modules": list(both.kind.projections), **fields}
    model = with_peft(both.torch(), **fields)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn(weight.shape)
    return model


def save(model, directory, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the base model's config, which is on no hub
        model.save_pretrained(directory, **kwargs)


def load(both, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(both.torch(), directory).eval()


def copy(source, target, **kwargs):
    """Reads an adapter and writes it again."""
    with read_adapter(source) as files:
        tensors = files.tensors
        entries = [(n, tensors.shape(n), tensors.dtype(n), lambda n=n: tensors[n]) for n in tensors]
        write_adapter(target, json.dumps(files.config, indent=2, sort_keys=True), entries, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_peft_saves(both, tmp_path, dtype):
    model = adapted(both).to(dtype)
    save(model, tmp_path)
    expected = peft.get_peft_model_state_dict(model)
    with read_adapter(tmp_path) as files:
        assert files.config == json.loads((tmp_path / CONFIG).read_text())
        assert files.config["r"] == 3
        assert set(files.tensors) == set(expected)
        assert len(expected) >= 8
        for name, x in expected.items():
            found = files.tensors[name]
            assert files.tensors.shape(name) == found.shape == tuple(x.shape)
            assert files.tensors.dtype(name) == found.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(found.astype("float32"), x.float().numpy())
        files.tensors.check_finite()


def test_peft_loads_what_is_written(both, tmp_path):
    model = adapted(both, modules_to_save=["ln_f", "norm"]).eval()
    save(model, tmp_path / "theirs")
    copy(tmp_path / "theirs", tmp_path / "ours", readme="# ours\n")
    theirs, ours = snapshot(tmp_path / "theirs"), snapshot(tmp_path / "ours")
    assert ours[WEIGHTS] == theirs[WEIGHTS]
    assert ours[CONFIG] == theirs[CONFIG]
    assert any(".norm." in n or ".ln_f." in n for n in read_adapter(tmp_path / "ours").tensors)
    again = load(both, tmp_path / "ours")
    assert torch.equal(torch_logits(again), torch_logits(model))
    assert not torch.equal(torch_logits(again), torch_logits(both.torch()))


def test_peft_takes_the_single_file_that_replaced_shards(both, tmp_path):
    model = adapted(both).eval()
    save(model, tmp_path / "theirs")
    copy(tmp_path / "theirs", tmp_path / "ours", max_shard_size="1KB")
    with read_adapter(tmp_path / "ours") as found, read_adapter(tmp_path / "theirs") as expected:
        assert len(list((tmp_path / "ours").glob("adapter_model-*"))) > 2
        assert set(found.tensors) == set(expected.tensors)
        for name, x in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], x)
    copy(tmp_path / "ours", tmp_path / "ours", overwrite=True)
    assert not list((tmp_path / "ours").glob("adapter_model-*"))
    assert torch.equal(torch_logits(load(both, tmp_path / "ours")), torch_logits(model))


def test_a_second_adapter_is_a_directory_below(both, tmp_path):
    model = adapted(both)
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=[both.kind.projections[0]]))
    save(model, tmp_path, selected_adapters=["other"])
    with pytest.raises(AdapterFileError, match="adapters in 'other': pass one of these director"):
        read_adapter(tmp_path)
    with read_adapter(tmp_path / "other") as files:
        assert files.config["r"] == 5
        assert set(files.tensors) == set(
            peft.get_peft_model_state_dict(model, adapter_name="other")
        )


def test_pickle_that_peft_saves_is_not_opened(both, tmp_path):
    model = adapted(both)
    save(model, tmp_path, safe_serialization=False)
    with pytest.raises(AdapterFileError, match=r"adapter_model.bin: found a pickle, .*save_file"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(feedforward_modules=[]),
        peft.LoHaConfig(),
        peft.LoKrConfig(),
        peft.VeraConfig(),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_are_refused_by_name(config, tmp_path):
    config.target_modules = ["q_proj"]
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    save(peft.get_peft_model(model, config), tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    method = config.peft_type.value
    with pytest.raises(AdapterFileError, match=f"{CONFIG}: found peft_type '{method}'; expected"):
        read_adapter(tmp_path)


def test_all_of_pefts_methods_but_one_are_refused(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(b"")
    for method in peft.PeftType:
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": method}))
        with pytest.raises(AdapterFileError, match=f"{method.value}|{WEIGHTS}") as caught:
            read_adapter(tmp_path)
        assert (CONFIG in str(caught.value)) == (method != "LORA")


@pytest.mark.parametrize("most", ["1GB", "12KB"])
def test_model_is_written_as_transformers_writes_it(both, tmp_path, most):
    model = both.torch()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    theirs = snapshot(tmp_path / "theirs")
    texts = {n: data.decode() for n, data in theirs.items() if n.endswith("config.json")}
    with open_safetensors(tmp_path / "theirs", "model") as tensors:
        entries = [
            (n, tensors.shape(n), tensors.dtype(n), lambda n=n: tensors[n])
            for n in model.state_dict()
            if n in tensors
        ]
        assert len(entries) == len(tensors)
        write_safetensors(tmp_path / "ours", entries, max_shard_size=most, texts=texts)
    ours = snapshot(tmp_path / "ours")
    assert len([n for n in ours if n.endswith(".safetensors")]) == 1 or most == "12KB"
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("index.json"):
            maps = [json.loads(files[name])["weight_map"] for files in (ours, theirs)]
            assert maps[0] == maps[1]
        else:
            assert ours[name] == theirs[name], name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(torch_logits(again), torch_logits(model))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
