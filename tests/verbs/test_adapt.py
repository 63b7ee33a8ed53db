"""adapt: where an Adapted may stand, what passes through, transformations, compile counts."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, wrapped

MODEL = TiedLM()
PARAMS = init(MODEL)
TARGETS = ["embed_tokens", "up"]
ADAPTED = wrapped(PARAMS, TARGETS)
MERGED = tied_lora.merge(ADAPTED)
W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def strict(fn):
    return tied_lora.adapt(fn, on_dense="error")


# Where it may stand


def test_equals_the_merged_model():
    got = strict(MODEL.apply)({"params": ADAPTED}, TOKENS)
    close(got, MODEL.apply({"params": MERGED}, TOKENS))
    assert float(jnp.abs(got - MODEL.apply({"params": PARAMS}, TOKENS)).max()) > 0.1


def test_stacked_layers_equal_the_merged_model():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["embed_tokens", "q_proj", "o_proj", "lm_head"], sites=sites)
    got = strict(model.apply)({"params": adapted}, TOKENS)
    close(got, model.apply({"params": tied_lora.merge(adapted)}, TOKENS))


def test_anywhere_among_the_arguments():
    def fn(*args, models=None, **kwargs):
        trees = [t for t in (*args, *(models or []), *kwargs.values()) if isinstance(t, dict)]
        return sum(X @ tree["w"] for tree in trees)

    adapted = wrapped(W, ["w"])
    expected = X @ tied_lora.merge(adapted)["w"]
    for args in ([adapted], [None, adapted], [np.ones(2), X, adapted]):
        close(strict(fn)(*args), expected)
    for kwargs in ({"params": adapted}, {"models": [None, adapted]}, {"other": adapted}):
        close(strict(fn)(**kwargs), expected)


def test_several_at_once():
    def fn(policy, reference, x):
        return x @ policy["w"] - x @ reference["w"], reference["w"].shape

    one, two = (wrapped(W, ["w"], seed=s) for s in (1, 2))
    got, shape = strict(fn)(one, two, X)
    close(got, fn(tied_lora.merge(one), tied_lora.merge(two), X)[0])
    assert shape == (8, 8)
    close(strict(fn)(one, one, X)[0], jnp.zeros((3, 8)))
    mixed = strict(fn)(one, tied_lora.base(one), X)[0]
    close(mixed, X @ (tied_lora.merge(one)["w"] - W["w"]))


def test_keeps_the_name_and_documentation():
    def fn(params):
        """Does something."""

    assert (strict(fn).__name__, strict(fn).__doc__) == ("fn", "Does something.")


# What passes through


class Config:
    """An object that JAX knows nothing of."""

    scale = 2.0


@dataclasses.dataclass
class Options:
    deterministic: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    logits: jax.Array
    name: str


def test_arguments_reach_the_function_as_they_are():
    mask, key, config, options = np.array([True, False]), jax.random.key(0), Config(), Options()
    seen = []

    def fn(params, *args, **kwargs):
        seen.append((args, kwargs))
        if args[0].any() and kwargs["train"]:  # a branch on a NumPy mask and on a flag
            noise = jax.random.normal(args[1], (8,))
        return X @ params["w"] + jnp.broadcast_to(noise, (3, 8))

    args = (mask, key, config, options, "mean", None, 3)
    strict(fn)(wrapped(W, ["w"]), *args, train=True, axis=None)
    [(got, kwargs)] = seen
    assert all(a is b for a, b in zip(got, args, strict=True))
    assert kwargs == {"train": True, "axis": None}


def test_results_that_are_no_arrays_come_back():
    config = Config()

    def fn(params):
        return {"y": X @ params["w"], "n": 3, "s": "text", "none": None, "config": config,
                "mask": np.ones(2), "out": Output(params["w"] @ X.T, "out"), "pair": (1.5, [True]),
            }  # fmt: skip

    adapted = wrapped(W, ["w"])
    got, expected = strict(fn)(adapted), fn(tied_lora.merge(adapted))
    assert isinstance(got["mask"], np.ndarray)
    assert got["config"] is config
    for name in ("n", "s", "none", "pair"):
        assert got[name] == expected[name]
    close(got["out"].logits, expected["out"].logits)
    assert got["out"].name == "out"


def test_untouched_leaves_come_back_as_they_are():
    adapted = wrapped(PARAMS, ["up"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tied_lora.UnreadTargetWarning)
        got = strict(lambda p: p["embed_tokens"])(adapted)
    assert got["embedding"] is PARAMS["embed_tokens"]["embedding"]


def test_mutable_collections():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(8, name="up")(x)
            count = self.variable("cache", "count", lambda: jnp.zeros((), jnp.int32))
            count.value = count.value + 1
            return nn.BatchNorm(use_running_average=False, name="norm")(y)

    variables = Model().init(jax.random.key(0), X)
    adapted = wrapped(variables["params"], ["up"])
    state = {k: v for k, v in variables.items() if k != "params"}
    run = functools.partial(Model().apply, mutable=["cache", "batch_stats"])
    got = strict(run)({"params": adapted, **state}, X)
    close(got, run({"params": tied_lora.merge(adapted), **state}, X))
    assert int(got[1]["cache"]["count"]) == 2
    key = {"dropout": jax.random.key(0)}
    got = tied_lora.adapt(nn.Dropout(0.5, deterministic=False).apply)
    with pytest.warns(tied_lora.UnreadTargetWarning):
        assert got({"params": adapted}, X, rngs=key).shape == X.shape


# Warnings


def test_target_that_is_read_nowhere():
    with pytest.warns(
        tied_lora.UnreadTargetWarning, match="'up/kernel' is adapted and read nowhere"
    ):
        tied_lora.adapt(lambda p: p["embed_tokens"]["embedding"][TOKENS])(ADAPTED)


@pytest.mark.filterwarnings("ignore::flax_tied_lora.DensifyWarning")
def test_a_weight_that_was_handed_back_is_not_called_unread():
    adapted = wrapped({"a": {"kernel": W["w"]}, "b": {"kernel": -W["w"]}}, ["a", "b"], seed=1)
    hand_back = tied_lora.adapt(lambda p: {"cut": p["a"]["kernel"][:2], "x": X @ p["b"]["kernel"]})
    use = tied_lora.adapt(lambda _, w: X[:, :2] @ w)
    given = hand_back(adapted)["cut"]
    with pytest.warns(tied_lora.UnreadTargetWarning) as seen:
        got = use(adapted, given)
    assert [str(w.message).split("'")[1] for w in seen] == ["b/kernel"]  # it was only read
    close(got, X[:, :2] @ tied_lora.merge(adapted)["a"]["kernel"][:2])


def test_unread_target_of_one_of_several():
    fn = tied_lora.adapt(lambda a, b: X @ a["w"])
    one, two = (wrapped(W, ["w"], seed=s) for s in (1, 2))
    with pytest.warns(tied_lora.UnreadTargetWarning, match="'w' is adapted and read nowhere"):
        fn(one, two)


def sine(params):
    with jax.named_scope("Model/act"):
        return jnp.sin(params["w"])


def test_densified_once_per_site_is_warned_of():
    adapted = wrapped(W, ["w"])
    match = r"'w' is read by 'sin' in 'Model/act'.* array of 256 bytes\. Take it out"
    with pytest.warns(tied_lora.DensifyWarning, match=match) as caught:
        got = tied_lora.adapt(sine)(adapted)
    assert len(caught) == 1
    close(got, sine(tied_lora.merge(adapted)))
    with pytest.warns(tied_lora.DensifyWarning) as caught:
        tied_lora.adapt(lambda p: (sine(p), jnp.cos(p["w"]), sine(p)))(adapted)
    assert len(caught) == 3
    assert caught[0].filename == __file__


def test_densified_is_refused_or_allowed():
    adapted = wrapped(W, ["w"])
    with pytest.raises(tied_lora.DensifyError, match="'w' is read by 'sin' in 'Model/act'"):
        strict(sine)(adapted)
    close(tied_lora.adapt(sine, on_dense="allow")(adapted), sine(tied_lora.merge(adapted)))


def test_weight_that_is_handed_back():
    adapted = wrapped(W, ["w"])
    with pytest.warns(tied_lora.DensifyWarning, match="'w' is handed back, as one array"):
        got = tied_lora.adapt(lambda p: p)(adapted)
    close(got, tied_lora.merge(adapted))


# dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_under_strict_promotion(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    adapted = wrapped(params, TARGETS)
    model = TiedLM()
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32), tied_lora.merge(adapted, dtype=jnp.float32)
    )
    exact = model.apply({"params": wide}, TOKENS)

    def run(p):
        table = p["embed_tokens"]["embedding"]
        x = table[TOKENS]
        x = x + jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"].reshape(1, 1, -1))
        return x @ table.T

    got = strict(run)(adapted)
    assert got.dtype == dtype
    merged = run(tied_lora.merge(adapted))
    errors = [float(jnp.abs(y.astype(jnp.float32) - exact).max()) for y in (got, merged)]
    assert errors[0] <= 2 * errors[1] + 1e-3


def test_objects_that_keep_state_reach_the_function_as_themselves():
    rngs = nnx.Rngs(0)
    found: list[Any] = []

    def model(params: Any, rngs: Any, batch: Any) -> jax.Array:
        found.extend([rngs, batch["rngs"]])
        return one_kernel.X @ params["dense"]["kernel"]

    tied_lora.adapt(model)(one_kernel.wrapped(), rngs, {"rngs": rngs})
    assert all(x is rngs for x in found)
