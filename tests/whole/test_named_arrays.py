"""Params in which each leaf is an array of another library: named by its module, in and out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, checkpoint, names, peft
from tests.helpers.named_arrays import NamedArray, logits, params

PARAMS, TOKENS = params(), jnp.arange(6)[None]
SITES = tied_lora.trace(logits, PARAMS, TOKENS)
Q, UP = ([f"layers/{n}/{name}/weight" for n in range(2)] for name in ("q_proj", "up_proj"))
TABLE = "embeddings/weight"


def wrapped(**config) -> tied_lora.Adapted:
    config = LoraConfig(**{"r": 2, "lora_alpha": 1, "init_lora_weights": False} | config)
    return tied_lora.wrap(PARAMS, config, sites=SITES)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"target_modules": ["q_proj"]}, Q),
        ({"target_modules": ["q_proj/weight"]}, Q),
        ({"target_modules": r".*\.q_proj"}, Q),
        ({"target_modules": ["embeddings"]}, [TABLE]),
        ({"target_modules": ["lm_head"]}, [TABLE]),
        ({"target_modules": "all-linear"}, [*Q, *UP]),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, UP),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, Q[1:]),
        (
            {"target_modules": ["q_proj", "0.up_proj"], "exclude_modules": ["0/q_proj"]},
            [Q[1], UP[0]],
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_module_is_found_by_its_name(config, keys):
    assert {g.key for g in wrapped(**config).plan.adapted} == set(keys)


def test_what_holds_the_module_is_not_its_name():
    for target in ("layers", "1", "weight/array"):
        with pytest.raises(ValueError, match="names no leaf, module or call site"):
            wrapped(target_modules=[target])


@pytest.mark.filterwarnings("error")
def test_patterns_biases_and_saved_modules_go_by_the_modules_name():
    plan = wrapped(
        target_modules=["q_proj"], rank_pattern={"1.q_proj": 4}, bias="lora_only",
        modules_to_save=["1/up_proj"],
    ).plan  # fmt: skip
    assert [a.rank for g, a in plan.adapters() if g.key in Q and a.kind == "lora"] == [2, 4]
    other = {g.key for g, a in plan.adapters() if a.kind != "lora"}
    biases = {key.replace("weight", "bias") for key in [*Q, UP[1]]}
    assert other == {*biases, UP[1]}


def test_logits_and_gradients_are_the_merged_models():
    adapted = wrapped(target_modules=["embeddings", "q_proj"])
    tied_lora.explain(logits, adapted, TOKENS).assert_tied()
    merged = tied_lora.merge(adapted)
    assert isinstance(merged["layers"][0]["q_proj"].weight, NamedArray)

    def loss(params):
        return jax.nn.log_softmax(logits(params, TOKENS))[..., 0].sum()

    value, grads = tied_lora.value_and_grad(tied_lora.adapt(loss))(adapted)
    assert jnp.allclose(value, loss(merged), rtol=1e-5)
    wanted = jax.grad(lambda a: loss(tied_lora.merge(adapted.replace(adapters=a))))(
        adapted.adapters
    )
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert jnp.allclose(found, expected, atol=1e-4)


def test_adapters_and_full_params_go_to_files_and_come_back(tmp_path):
    adapted = wrapped(target_modules=["embeddings", "q_proj"])
    expected = tied_lora.adapt(logits)(adapted, TOKENS)
    table = names.names_of(
        None,
        [
            ("embeddings/weight", "model.embed_tokens.weight", "v e -> v e", "embedding"),
            *(
                line
                for name in ("q_proj", "up_proj")
                for line in [
                    (
                        f"layers/{{}}/{name}/weight",
                        f"layers.{{}}.{name}.weight",
                        "out in -> out in",
                    ),
                    (f"layers/{{}}/{name}/bias", f"layers.{{}}.{name}.bias"),
                ]
            ),
        ],
        tied={"embeddings/weight": ("lm_head",)},
    )
    peft.save_adapter(tmp_path / "adapter", adapted, table)
    loaded = peft.load_adapter(tmp_path / "adapter", PARAMS, table, sites=SITES)
    assert jnp.allclose(tied_lora.adapt(logits)(loaded, TOKENS), expected, atol=1e-5)
    checkpoint.save(tmp_path / "own", adapted)
    restored = checkpoint.restore(tmp_path / "own", PARAMS).adapted
    assert (tied_lora.adapt(logits)(restored, TOKENS) == expected).all()
    checkpoint.save_params(tmp_path / "params", tied_lora.merge(adapted))
    plain = checkpoint.restore_params(tmp_path / "params", PARAMS)
    assert jnp.allclose(logits(plain, TOKENS), expected, atol=1e-5)


def test_tied_params_come_back_without_a_target_as_dicts_of_arrays(tmp_path):
    """Boxes are not in a checkpoint, these as little as Flax's."""
    tied = {**PARAMS, "head": {"weight": NamedArray(PARAMS["embeddings"]["weight"].array, "ve")}}
    checkpoint.save_params(tmp_path / "params", tied)
    plain = checkpoint.restore_params(tmp_path / "params")
    assert (plain["head"]["weight"] == tied["head"]["weight"].array).all()
    again = checkpoint.restore_params(tmp_path / "params", tied)
    assert again["head"]["weight"].names == "ve"
    assert again["head"]["weight"].array is again["embeddings"]["weight"].array
