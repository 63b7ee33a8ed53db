"""Which biases are trained, and under which names PEFT stores them: real PEFT, pinned, and ours."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import safetensors.numpy
import torch

from tests.against_torch.torch_models import with_peft

pytestmark = pytest.mark.models


class Net(torch.nn.Module):
    """Three layers with a bias, one of which is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, x: Any) -> Any:
        return self.norm(self.down(self.up(x)))


def trained(model: Any) -> set[str]:
    """Returns paths of the biases that PEFT trains, as Flax has them."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".", "/")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.endswith("bias")
    }


@pytest.mark.parametrize(
    ("bias", "stored"),
    [
        ("none", set()),
        ("lora_only", {"up.base_layer.bias"}),
        ("all", {"up.base_layer.bias", "down.bias", "norm.bias"}),
    ],
)
def test_peft_stores_biases_under_these_names(tmp_path, bias, stored):
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"], bias=bias))
    model.save_pretrained(tmp_path)
    names = set(safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors"))
    factors = {"up.lora_A.weight", "up.lora_B.weight"}
    assert names == {f"base_model.model.{name}" for name in stored | factors}
    assert trained(model) == {n.replace(".base_layer", "").replace(".", "/") for n in stored}


def test_peft_stores_the_bias_of_a_saved_module_three_times(tmp_path):
    """With "all": the copy's bias under its own name and the wrapper's, and the frozen one."""
    config = peft.LoraConfig(target_modules=["up"], bias="all", modules_to_save=["down"])
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(n.removeprefix("base_model.model.") for n in names if "down" in n) == [
        "down.bias", "down.modules_to_save.bias", "down.original_module.bias", "down.weight",
    ]  # fmt: skip
    assert "down/original_module/bias" not in trained(model)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_ours_trains_the_same_biases(pairs, bias):
    pair = pairs["gpt2"]
    fields = {"target_modules": ["c_attn"], "bias": bias, "r": 2}
    adapted = pair.wrap(**fields)
    model = with_peft(pair.torch(), **fields)
    expected = trained(model)
    assert set(adapted.adapters.get("bias", {})) == expected
    assert len(expected) == {"none": 0, "lora_only": 2, "all": 13}[bias]
    leaves = dict(_leaves(pair.flax.params))
    for path, value in adapted.adapters.get("bias", {}).items():
        assert (value == leaves[path]).all(), path


def _leaves(tree: Any, path: str = "") -> Any:
    for name, node in tree.items():
        where = f"{path}/{name}" if path else name
        yield from _leaves(node, where) if isinstance(node, dict) else [(where, node)]
