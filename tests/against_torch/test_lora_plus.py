"""Against PEFT's create_loraplus_optimizer: the same arrays in the same groups, equal steps."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import flax_tied_lora as tied_lora
from flax_tied_lora import train
from flax_tied_lora._planning.plan import AdapterPlan
from flax_tied_lora.train import lora_plus
from tests.against_torch.torch_models import copy_factors, factors, far, torch_layer, with_peft
from tests.against_torch.training import BETAS, train_here, train_there

pytestmark = pytest.mark.models
RATE, RATIO, EMBEDDING, DECAY = 2e-3, 4, 5e-3, 0.25
WIDTH, RANK = 6, 2


class Model(torch.nn.Module):
    """One layer of every sort that PEFT puts in a group."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, WIDTH)
        self.wpe = torch.nn.Embedding(8, WIDTH)
        self.relative_attention_bias = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_proj = torch.nn.Linear(WIDTH, WIDTH)
        self.ln_f = torch.nn.LayerNorm(WIDTH)
        self.score = torch.nn.Linear(WIDTH, 3)


def torch_groups(**options: Any) -> dict[str, tuple[float, float]]:
    """The learning rate and the weight decay of each of PEFT's Parameters, by its short name."""
    config = peft.LoraConfig(
        r=RANK,
        target_modules=["embed_tokens", "q_proj", "relative_attention_bias"],
        modules_to_save=["score", "ln_f"],
        trainable_token_indices={"wpe": [1, 2]},
        bias="all",
        use_dora=True,
    )
    model = peft.get_peft_model(Model(), config)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(found) == set(names.values())
    short = re.compile(r"base_model\.model\.|\.(default|weight|base_layer|token_adapter)(?=\.|$)")
    return {short.sub("", name): value for name, value in found.items()}


def plan_of_the_same() -> tied_lora.Plan:
    def group(key: str, kind: str, shape: tuple[int, ...], **fields: Any) -> tied_lora.GroupPlan:
        members = (tied_lora.Member(key),)
        rows, cols = ((0,), (1,)) if len(shape) == 2 else ((), ())
        table = key.endswith("embedding")
        adapter = AdapterPlan(kind, key, **fields)
        return tied_lora.GroupPlan(
            members, (), shape, "float32", rows, cols, is_table=table, adapters=(adapter,)
        )

    square, factored = (WIDTH, WIDTH), {"rank": RANK, "dora": True}
    groups = (
        group("embed_tokens/embedding", "lora", (8, WIDTH), **factored),
        group("wpe/embedding", "trainable_tokens", (8, WIDTH), tokens=(1, 2)),
        group("relative_attention_bias/kernel", "lora", square, **factored),
        group("q_proj/kernel", "lora", square, **factored),
        group("q_proj/bias", "bias", (WIDTH,)),
        group("ln_f/scale", "modules_to_save", (WIDTH,)),
        group("ln_f/bias", "modules_to_save", (WIDTH,)),
        group("score/kernel", "modules_to_save", (WIDTH, 3)),
        group("score/bias", "modules_to_save", (3,)),
    )
    return tied_lora.Plan.of(groups, tied_lora.LoraConfig(target_modules=["q_proj"]))


# PEFT's names for what we have under collection, key and factor.
NAMES = {
    "embed_tokens.lora_embedding_A": "lora/embed_tokens/embedding/lora_a",
    "embed_tokens.lora_embedding_B": "lora/embed_tokens/embedding/lora_b",
    "embed_tokens.lora_magnitude_vector": "lora/embed_tokens/embedding/lora_magnitude",
    "q_proj.lora_A": "lora/q_proj/kernel/lora_a",
    "q_proj.lora_B": "lora/q_proj/kernel/lora_b",
    "q_proj.lora_magnitude_vector": "lora/q_proj/kernel/lora_magnitude",
    "relative_attention_bias.lora_A": "lora/relative_attention_bias/kernel/lora_a",
    "relative_attention_bias.lora_B": "lora/relative_attention_bias/kernel/lora_b",
    "relative_attention_bias.lora_magnitude_vector": (
        "lora/relative_attention_bias/kernel/lora_magnitude"
    ),
    "wpe.trainable_tokens_delta": "trainable_tokens/wpe/embedding",
    "q_proj.bias": "bias/q_proj/bias",
    "ln_f.modules_to_save": "modules_to_save/ln_f/scale",
    "ln_f.modules_to_save.bias": "modules_to_save/ln_f/bias",
    "score.modules_to_save": "modules_to_save/score/kernel",
    "score.modules_to_save.bias": "modules_to_save/score/bias",
}


def our_groups(plan: tied_lora.Plan, *args: Any, **options: Any) -> dict[str, Any]:
    """The learning rate and the weight decay of each array, read off one step of plain descent."""

    def descent(rate: Any, weight_decay: float) -> Any:
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate))

    adapters: dict[str, Any] = {}
    for group, adapter in plan.adapters():
        arrays = {name: jnp.ones(shape) for name, shape in group.shapes(adapter).items()}
        adapters.setdefault(adapter.kind, {})[adapter.key] = arrays.get("", arrays)
    optimizer = lora_plus(plan, *args, optimizer=descent, **options)
    zeros, state = jax.tree.map(jnp.zeros_like, adapters), optimizer.init(adapters)
    rate, _ = optimizer.update(adapters, state, zeros)
    decay, _ = optimizer.update(zeros, state, adapters)
    leaves = zip(*map(jax.tree_util.tree_leaves_with_path, (rate, decay)), strict=True)
    return {
        "/".join(entry.key for entry in path): (-float(r.max()), float((d / r).max()))
        for (path, r), (_, d) in ((a, b) for a, b in leaves)
    }


@pytest.mark.parametrize("given", [True, False])
def test_the_same_arrays_in_the_same_groups(given):
    theirs: dict[str, Any] = {"lr": RATE, "loraplus_lr_ratio": RATIO}
    ours: dict[str, Any] = {}
    if given:
        theirs |= {"loraplus_lr_embedding": EMBEDDING, "loraplus_weight_decay": DECAY}
        ours |= {"embedding_learning_rate": EMBEDDING, "weight_decay": DECAY}
    expected = {NAMES[name]: value for name, value in torch_groups(**theirs).items()}
    found = our_groups(plan_of_the_same(), RATE, RATIO, **ours)
    assert set(found) == set(expected) == set(NAMES.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert len(set(expected.values())) == (4 if given else 3)


def test_pefts_tied_table_is_in_two_groups(both):
    """Its memory is stepped at the tables' rate and, as the head's, at the other two."""
    fields: dict[str, Any] = {"target_modules": [both.kind.tied_target]}
    model = with_peft(both.torch(), ensure_weight_tying=True, **fields)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=EMBEDDING
    )
    rates: dict[int, list[float]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates.setdefault(p.untyped_storage().data_ptr(), []).append(group["lr"])
    assert sorted(map(sorted, rates.values())) == sorted(
        ([RATE, EMBEDDING], [EMBEDDING, RATE * RATIO])
    )
    table = both.wrap(target_modules=[both.kind.table.rpartition(".")[2]])
    assert train.labels(table) == {
        "lora": {both.kind.key: {"lora_a": "embedding", "lora_b": "embedding"}}
    }


def test_steps(pairs):
    """GPT-2's attention, and its positions: a table that is looked up only."""
    both = pairs["gpt2"]
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "wpe"]}
    before = both.wrap(**fields)
    model = with_peft(both.torch(), **fields)
    assert isinstance(torch_layer(model, "transformer/wpe/embedding"), peft.tuners.lora.Embedding)
    copy_factors(before, model)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, betas=BETAS,
        loraplus_lr_embedding=EMBEDDING, loraplus_weight_decay=DECAY,
    )  # fmt: skip

    def adamw(rate: Any, weight_decay: float) -> Any:
        return optax.adamw(rate, *BETAS, weight_decay=weight_decay)

    ours = lora_plus(
        before, RATE, RATIO,
        embedding_learning_rate=EMBEDDING, weight_decay=DECAY, optimizer=adamw,
    )  # fmt: skip
    expected = train_there(model, optimizer, steps=5)
    after, losses = train_here(both, before, ours, steps=5)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    plain, _ = train_here(both, before, optax.adamw(RATE, *BETAS, weight_decay=DECAY), steps=5)
    assert len(after.adapters["lora"]) == 3
    for key, pair in after.adapters["lora"].items():
        theirs = factors(torch_layer(model, key))
        for name in ("lora_a", "lora_b"):
            assert far(pair[name], theirs[name]) < 1e-3, (key, name)
            # With one rate for all, every one goes elsewhere.
            assert far(plain.adapters["lora"][key][name], theirs[name]) > 2e-3, (key, name)
