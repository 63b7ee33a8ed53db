"""Arithmetic on adapters against PEFT's ``add_weighted_adapter`` on the same factors.

Where the two differ on purpose is pinned too: rsLoRA, patterns of ranks, and what PEFT adds up
without a word.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic
from tests.against_torch.torch_models import far, perturbed, torch_logits, with_peft

pytestmark = pytest.mark.models
SHAPES = {"embed_tokens": (20, 6), "q_proj": (6, 9), "v_proj": (6, 6)}
LEAVES = {n: f"{n}/{'embedding' if n == 'embed_tokens' else 'kernel'}" for n in SHAPES}
TARGETS = list(SHAPES)


class Torch(torch.nn.Module):
    """A table and two projections, none tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(*SHAPES["embed_tokens"])
        self.q_proj = torch.nn.Linear(*SHAPES["q_proj"], bias=False)
        self.v_proj = torch.nn.Linear(*SHAPES["v_proj"], bias=False)

    def forward(self, tokens: Any) -> Any:
        x = self.embed_tokens(tokens)
        return self.q_proj(x + self.v_proj(x))


def both(*fields: dict[str, Any]) -> tuple[list[tied_lora.Adapted], Any]:
    """The same adapters here and in PEFT, which calls them "0", "1", ..."""
    torch.manual_seed(3)
    model = Torch()
    params = {
        name: {LEAVES[name].split("/")[1]: jnp.asarray(_ours(getattr(model, name)))}
        for name in SHAPES
    }
    fields = tuple({"target_modules": TARGETS, "r": 3, "lora_alpha": 6} | f for f in fields)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(**fields[0]), "0")
    for i, more in enumerate(fields[1:], 1):
        peft_model.add_adapter(str(i), peft.LoraConfig(**more))
    adapteds = []
    for i, own in enumerate(fields):
        adapted = tied_lora.wrap(params, tied_lora.LoraConfig(**own))
        rng = np.random.default_rng(i)
        adapted = adapted.replace(
            adapters=jax.tree.map(
                lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
                adapted.adapters,
            )
        )
        for key, pair in adapted.adapters["lora"].items():
            with torch.no_grad():
                for name, theirs in factors(peft_model, key, str(i)).items():
                    theirs.copy_(torch.from_numpy(np.array(pair[name].T)))
        adapteds.append(adapted)
    return adapteds, peft_model


def _ours(module: Any) -> np.ndarray:
    weight = module.weight.detach().numpy()
    return weight.copy() if isinstance(module, torch.nn.Embedding) else weight.T.copy()


def layer(model: Any, key: str) -> Any:
    return model.base_model.model.get_submodule(key.partition("/")[0])


def factors(model: Any, key: str, name: str) -> dict[str, Any]:
    own = layer(model, key)
    if name in own.lora_embedding_A:
        return {"lora_a": own.lora_embedding_A[name], "lora_b": own.lora_embedding_B[name]}
    return {"lora_a": own.lora_A[name].weight, "lora_b": own.lora_B[name].weight}


def their_delta(model: Any, key: str, name: str) -> np.ndarray:
    """PEFT's delta in our layout."""
    delta = layer(model, key).get_delta_weight(name).detach().numpy()
    return delta if key == LEAVES["embed_tokens"] else delta.T


def our_delta(adapted: tied_lora.Adapted, key: str) -> np.ndarray:
    pair = adapted.adapters["lora"][key]
    a, b = (np.asarray(pair[n], np.float64) for n in ("lora_a", "lora_b"))
    return float(adapted.scaling[key]) * a @ b


def combined(adapteds: Any, model: Any, weights: Any, how: str, rank: Any = None) -> Any:
    names = [str(i) for i in range(len(adapteds))]
    model.add_weighted_adapter(names, weights, "sum", how, svd_rank=rank)
    return arithmetic.combine(adapteds, weights, how, rank)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3], [-0.2, 0.0], [-2.0, -0.5]])
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_combined(how, weights):
    adapteds, model = both({}, {"lora_alpha": 5})
    ours = combined(adapteds, model, weights, how)
    theirs = model.peft_config["sum"]
    assert (ours.plan.config.r, ours.plan.config.lora_alpha) == (theirs.r, theirs.lora_alpha)
    for key in LEAVES.values():
        assert far(our_delta(ours, key), their_delta(model, key, "sum")) < 1e-5
        assert float(ours.scaling[key]) == layer(model, key).scaling["sum"] == 1.0
        for name, array in factors(model, key, "sum").items():
            found, expected = ours.adapters["lora"][key][name], array.detach().numpy().T
            # PEFT multiplies A with the weight, which for a table is the factor of its rows.
            if how in ("linear", "cat"):
                assert far(found, expected) < 1e-6
            else:  # the singular values are in B
                norms = [np.linalg.norm(np.asarray(x), axis=0 if name == "lora_a" else 1)
                         for x in (found, expected)]  # fmt: skip
                assert far(*norms) < 1e-4


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_of_a_rank(rank):
    adapteds, model = both({}, {"r": 2})
    ours = combined(adapteds, model, [0.5, -1.5], "svd", rank)
    assert ours.plan.config.r == model.peft_config["sum"].r == (rank or 3)
    for key in LEAVES.values():
        assert far(our_delta(ours, key), their_delta(model, key, "sum")) < 1e-5


def test_cat_of_different_ranks_and_targets():
    adapteds, model = both({"target_modules": ["q_proj"]}, {"r": 2, "target_modules": TARGETS[:2]})
    ours = combined(adapteds, model, [0.5, -1.5], "cat")
    assert set(ours.plan.config.target_modules) == model.peft_config["sum"].target_modules
    for key in (LEAVES["q_proj"], LEAVES["embed_tokens"]):
        assert far(our_delta(ours, key), their_delta(model, key, "sum")) < 1e-5
    # PEFT fills up with zeros where an adapter is missing: ranks of a group are its own here.
    theirs = factors(model, LEAVES["embed_tokens"], "sum")["lora_a"]
    assert (theirs.shape[0], torch.count_nonzero(theirs.abs().sum(1)).item()) == (5, 2)
    assert {a.key: a.rank for _, a in ours.plan.adapters()} == {
        LEAVES["q_proj"]: 5, LEAVES["embed_tokens"]: 2,
    }  # fmt: skip


def test_one_adapter_is_linear_to_peft_whatever_the_rank():
    adapteds, model = both({})
    ours = combined(adapteds, model, [-1.5], "svd", 1)
    key = LEAVES["q_proj"]
    assert factors(model, key, "sum")["lora_a"].shape[0] == 3
    assert ours.adapters["lora"][key]["lora_a"].shape == (6, 1)
    whole = arithmetic.combine(adapteds, [-1.5], "svd")
    assert far(our_delta(whole, key), their_delta(model, key, "sum")) < 1e-5


def test_rslora_grows_by_the_root_of_the_rank_in_peft():
    """PEFT keeps use_rslora and sets alpha to the rank: sqrt(rank) times the sum that was asked."""
    adapteds, model = both({"use_rslora": True}, {"use_rslora": True})
    ours = combined(adapteds, model, [0.5, 0.25], "cat")
    assert not ours.plan.config.use_rslora
    for key in LEAVES.values():
        expected = 0.5 * their_delta(model, key, "0") + 0.25 * their_delta(model, key, "1")
        assert far(our_delta(ours, key), expected) < 1e-5
        assert far(their_delta(model, key, "sum"), 6**0.5 * expected) < 1e-5


def test_patterns_of_ranks():
    fields = {"r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 1}}
    adapteds, model = both(fields, fields)
    ours = combined(adapteds, model, [0.5, -1.5], "cat")
    for key in LEAVES.values():
        assert far(our_delta(ours, key), their_delta(model, key, "sum")) < 1e-5
    assert ours.plan.config.r == 4
    assert ours.plan.config.rank_pattern == {"q_proj": 6}
    assert model.peft_config["sum"].r == 6  # for all, filled up with zeros
    # Our config, read by PEFT, gives its layers our shapes and scaling.
    config = ours.plan.config.to_dict()
    again = peft.get_peft_model(Torch(), peft.LoraConfig(**_peft_fields(config)), "0")
    for key in LEAVES.values():
        shapes = {n: tuple(x.shape[::-1]) for n, x in factors(again, key, "0").items()}
        assert shapes == {n: x.shape for n, x in ours.adapters["lora"][key].items()}
        assert layer(again, key).scaling["0"] == 1.0


def _peft_fields(config: dict[str, Any]) -> dict[str, Any]:
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
    return {name: config[name] for name in names}


def test_full_copies_are_refused_by_both():
    fields = {"modules_to_save": ["v_proj"], "target_modules": ["q_proj"]}
    adapteds, model = both(fields, fields)
    with pytest.raises(ValueError, match="if they target the same module with modules_to_save"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", "cat")
    with pytest.raises(ValueError, match="'v_proj/kernel' is trained in modules_to_save"):
        arithmetic.combine(adapteds, [1.0, 1.0], "cat")


def test_dora_is_refused_where_peft_forgets_the_magnitudes():
    fields = {"use_dora": True, "target_modules": ["q_proj"]}
    adapteds, model = both(fields, fields)
    own = layer(model, "q_proj").lora_magnitude_vector
    start = own["0"].weight.detach().clone()
    with torch.no_grad():
        for name in ("0", "1"):
            own[name].weight.mul_(3)
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", "cat")
    assert far(own["sum"].weight.detach().numpy(), start.numpy()) < 1e-6
    with pytest.raises(ValueError, match="'q_proj/kernel' is DoRA"):
        arithmetic.combine(adapteds, [1.0, 1.0], "cat")


def test_linear_of_different_ranks_is_refused_by_both():
    adapteds, model = both({}, {"r": 2})
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", "linear")
    with pytest.raises(ValueError, match=r"has the ranks \[3, 2\]"):
        arithmetic.combine(adapteds, [1.0, 1.0], "linear")


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0])
def test_scaled(factor):
    (adapted,), model = both({})
    layer(model, LEAVES["q_proj"]).scale_layer(factor)
    # PEFT's scale_layer passes over embeddings without a word; its set_scale does not.
    table = layer(model, LEAVES["embed_tokens"])
    table.scale_layer(factor)
    assert table.scaling["0"] == 2.0
    table.set_scale("0", factor)
    ours = arithmetic.scale(adapted, {"q_proj": factor, "embed_tokens": factor})
    for key in LEAVES.values():
        expected = their_delta(model, key, "0")
        np.testing.assert_allclose(our_delta(ours, key), expected, rtol=1e-5, atol=1e-6)


def test_logits_of_a_model(pairs):
    """A tied Llama with q_proj and v_proj, which are no part of the tie: logits of the sum."""
    both = pairs["llama"]
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    adapteds = [perturbed(both.wrap(**fields)), perturbed(both.wrap(**fields), 0.2)]
    model = with_peft(both.torch(), **fields)
    model.add_adapter("other", peft.LoraConfig(**fields))
    for name, adapted in zip(("default", "other"), adapteds, strict=True):
        for key, pair in adapted.adapters["lora"].items():
            own = model.base_model.model.get_submodule(key.rpartition("/")[0].replace("/", "."))
            with torch.no_grad():
                own.lora_A[name].weight.copy_(torch.from_numpy(np.array(pair["lora_a"].T)))
                own.lora_B[name].weight.copy_(torch.from_numpy(np.array(pair["lora_b"].T)))
    apply = tied_lora.adapt(both.logits, on_dense="error")
    unadapted = both.logits(tied_lora.base(adapteds[0]))
    for how in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default", "other"], [0.7, -0.6], how, how)
        model.set_adapter(how)
        with torch.no_grad():
            expected = torch_logits(model)
        assert far(apply(arithmetic.combine(adapteds, [0.7, -0.6], how)), expected) < 1e-4
        assert far(unadapted, expected) > 1e-2
