"""Against PEFT 0.21.2 in PyTorch: same weights, same factors.

PEFT ties adapters of an embedding and a head by two Parameters over one memory, four in all; the
head's are swapped and transposed. What differs on purpose is pinned too: its merge adds the delta
twice.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest
import torch

import flax_tied_lora as tied_lora
from tests.against_torch.torch_models import (
    LABELS,
    NOT_ENSURED,
    copy_factors,
    factors,
    far,
    gradients,
    leaf,
    peft_warnings,
    perturbed,
    tied,
    torch_layer,
    torch_logits,
    with_peft,
)

pytestmark = pytest.mark.models
NO_TIE = "You have requested `ensure_weight_tying`, but no tied modules are added"

COMPLICATIONS = "Model with `tie_word_embeddings=True` and the tied_target_modules="


def test_version_that_these_facts_are_of():
    assert peft.__version__ == "0.21.2"


def test_conversion_gives_the_same_model(both):
    """A tied Llama's head is random after conversion: it takes the tie to be the same model."""
    base = tied_lora.base(both.wrap(target_modules=list(both.kind.projections)[:1]))
    with torch.no_grad():
        expected = torch_logits(both.torch())
    assert far(both.logits(base), expected) < 1e-5
    lost = both.kind.ties != "auto"
    assert (far(both.logits(both.flax.params), expected) > 0.1) is lost


@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits(both, use_rslora):
    adapted, model = tied(both, use_rslora=use_rslora)
    logits = jax.jit(tied_lora.adapt(both.logits, on_dense="error"))(adapted)
    with torch.no_grad():
        expected = torch_logits(model)
        with model.disable_adapter():
            unadapted = torch_logits(model)
    assert far(logits, expected) < 1e-4
    assert far(unadapted, expected) > 1e-2


def test_gradient_of_a_tied_factor_is_the_sum_over_pefts_two(both):
    adapted, model = tied(both)
    apply = tied_lora.adapt(both.logits, on_dense="error")

    def loss(adapted: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(adapted), LABELS)
        return losses.mean()

    value, grads = jax.jit(tied_lora.value_and_grad(loss))(adapted)
    labels = torch.from_numpy(LABELS).long()
    logits = torch_logits(model)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert far(value, expected.item()) < 1e-4

    table = gradients(torch_layer(model, both.kind.key))
    head = gradients(model.base_model.model.lm_head)  # swapped and transposed
    ours = grads["lora"].pop(both.kind.key)
    assert far(ours["lora_a"], table["lora_a"] + head["lora_b"].T) < 1e-4
    assert far(ours["lora_b"], table["lora_b"] + head["lora_a"].T) < 1e-4
    # Neither part is the whole, nor nothing.
    for part in (table["lora_a"], head["lora_b"].T):
        assert far(part, ours["lora_a"]) > 0.05

    assert len(grads["lora"]) == 2 * len(both.kind.projections)
    for key, found in grads["lora"].items():
        theirs = gradients(torch_layer(model, key))
        for name in ("lora_a", "lora_b"):
            assert far(found[name], theirs[name]) < 1e-4, (key, name)


def test_peft_keeps_four_parameters_where_we_keep_two(both):
    adapted, model = tied(both)
    embedding, head = torch_layer(model, both.kind.key), model.base_model.model.lm_head
    theirs = [
        embedding.lora_embedding_A["default"],
        embedding.lora_embedding_B["default"],
        head.lora_B["default"].weight,
        head.lora_A["default"].weight,
    ]
    assert len({id(p) for p in theirs}) == 4
    assert len({p.untyped_storage().data_ptr() for p in theirs}) == 2
    assert sum(p.requires_grad for p in theirs) == 4
    ours = [x.shape for x in jax.tree.leaves(adapted.adapters["lora"][both.kind.key])]
    assert sorted(ours) == sorted(tuple(p.T.shape) for p in theirs[:2])


def test_merge_adds_the_delta_once_where_peft_adds_it_twice(both):
    adapted, model = tied(both)
    key = both.kind.key
    name = both.kind.table
    before = both.torch().get_submodule(name).weight.detach().numpy()
    pair = adapted.adapters["lora"][key]
    delta = 1.5 * np.asarray(pair["lora_a"], np.float64) @ np.asarray(pair["lora_b"], np.float64)
    merged = leaf(tied_lora.merge(adapted), key)
    assert far(merged - before, delta) < 1e-5

    with peft_warnings(COMPLICATIONS):
        unloaded = model.merge_and_unload()
    table = unloaded.get_submodule(name).weight
    assert table.data_ptr() == unloaded.lm_head.weight.data_ptr()
    assert far(table.detach().numpy() - before, 2 * delta) < 1e-5
    # An untied weight is merged alike.
    for group in adapted.plan.adapted:
        if group.key != key:
            weight = unloaded.get_submodule(group.key.rpartition("/")[0].replace("/", ".")).weight
            ours = np.asarray(leaf(tied_lora.merge(adapted), group.key))
            assert far(ours.T, weight.detach().numpy()) < 1e-6, group.key


def test_wte_is_no_embedding_to_peft(pairs):
    """Targeting ``wte`` with ensure_weight_tying=True, PEFT warns and adapts the lookup alone."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["wte"]}
    both = pairs["gpt2"]
    model = with_peft(both.torch(), NO_TIE, ensure_weight_tying=True, **fields)
    assert model.targeted_module_names == ["transformer.wte"]
    adapted = perturbed(both.wrap(**fields))
    copy_factors(adapted, model)
    explanation = tied_lora.explain(both.logits, adapted)
    assert [r.site.role for r in explanation.reads] == ["lookup", "projection"]
    with torch.no_grad():
        assert far(tied_lora.adapt(both.logits)(adapted), torch_logits(model)) > 1e-2


def test_scaling_and_ranks_follow_the_patterns(pairs):
    both = pairs["llama"]
    fields: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["embed_tokens", "q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6, r".*\.0\.mlp\.down_proj": 3},
        "alpha_pattern": {"v_proj": 32, "model.layers.0.self_attn.q_proj": 5, "embed_tokens": 1},
    }
    for use_rslora in (False, True):
        model = with_peft(both.torch(), NOT_ENSURED, use_rslora=use_rslora, **fields)
        adapted = both.wrap(use_rslora=use_rslora, **fields)
        assert len(adapted.plan.adapted) == 7
        seen = set()
        for group, adapter in adapted.plan.adapters():
            layer = torch_layer(model, group.key)
            assert adapter.rank == layer.r["default"], group.key
            np.testing.assert_allclose(
                adapted.scaling[group.key], layer.scaling["default"], rtol=1e-6
            )
            shapes = {name: x.shape for name, x in factors(layer).items()}
            assert group.shapes(adapter) == shapes
            seen.add((adapter.rank, layer.lora_alpha["default"]))
        assert seen == {(4, 1), (2, 5), (2, 10), (4, 32), (6, 32), (3, 10), (4, 10)}


@pytest.mark.parametrize("layers", [None, 1])
def test_all_linear_and_layers_name_the_same_modules(both, layers):
    if layers is None:
        fields: dict[str, Any] = {"target_modules": "all-linear"}
    else:
        fields = {"target_modules": list(both.kind.projections), "layers_to_transform": layers}
    model = with_peft(both.torch(), **fields)
    ours = {**fields}
    if layers is not None:
        ours["target_modules"] = [t.replace(".", "/") for t in both.kind.projections]
    adapted = both.wrap(**ours)
    found = {g.key.rpartition("/")[0].replace("/", ".") for g in adapted.plan.adapted}
    assert found == set(model.targeted_module_names)
