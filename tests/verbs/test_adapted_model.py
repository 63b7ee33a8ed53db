"""`AdaptedModel` on a model object of a test's own, built as transformers' Flax models are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import AdaptedModel
from tests.helpers.oracle import array, wrapped

IDS = np.array([[1, 2, 3]], np.int32)


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Model:
    """Has params of its own, which it runs with where it is given none."""

    def __init__(self):
        self.config = Config()
        self.params = {"embed": {"embedding": array(16, 8)}, "proj": {"kernel": array(8, 8)}}
        self.traced = 0

    def __call__(self, ids: Any, mask: Any = None, params: Any = None, *, train: bool = False):
        params = self.params if params is None else params
        self.traced += 1
        hidden = params["embed"]["embedding"][ids] @ params["proj"]["kernel"]
        hidden = hidden if mask is None else hidden * mask[..., None]
        return {"logits": self.config.scale * hidden @ params["embed"]["embedding"].T, "none": None}

    def _steps(self, ids: Any, steps: Any = 1, params: Any = None) -> Any:
        for _ in range(sum(steps) if isinstance(steps, list | set) else steps):
            last = jnp.argmax(self(ids, params=params)["logits"][:, -1:], axis=-1)
            ids = jnp.concatenate([ids, last.astype(ids.dtype)], axis=1)
        return ids

    def score(self, ids: Any) -> Any:
        return self(ids)["logits"].sum()

    def scaled(self, scale: float) -> None:
        self.config = Config(scale)

    def init_weights(self, rng: Any, shape: Any, params: Any = None) -> Any:
        return params

    def to_float16(self, params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float16), params)

    def save_pretrained(self, where: list[Any], params: Any = None) -> None:
        where.append(self.params if params is None else params)

    def push_to_hub(self, name: str) -> None:
        raise AssertionError("sent the model's own params")


class Base(Model):
    def generate(self, ids: Any, steps: Any = 1, params: Any = None) -> Any:
        return self._steps(ids, steps, params)


class Overrides(Base):
    """Hands ``params`` on to the method that it overrides, as Whisper's ``generate`` does."""

    def generate(self, ids: Any, *, start: int = 0, **kwargs: Any) -> Any:
        return super().generate(ids[:, start:], **kwargs)


def adapted_of(model: Model, seed: int = 0) -> tied_lora.Adapted:
    return wrapped(model.params, ["embed", "proj"], seed=seed)


@pytest.fixture
def model() -> Base:
    return Base()


@pytest.fixture
def adapted(model) -> AdaptedModel:
    return AdaptedModel(model, adapted_of(model), on_dense="error")


def test_it_is_called_like_the_model_and_gives_what_the_merged_model_does(model, adapted):
    expected = model(IDS, params=adapted.merge())
    found = adapted(IDS)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=2e-5, atol=2e-4)
    assert found["none"] is None
    mask = np.array([[1.0, 0.0, 1.0]], np.float32)
    np.testing.assert_allclose(
        adapted(IDS, mask, train=True)["logits"],
        model(IDS, mask, params=adapted.merge())["logits"],
        rtol=2e-5, atol=2e-4,
    )  # fmt: skip
    assert not np.allclose(found["logits"], model(IDS)["logits"], atol=1e-2)


@pytest.mark.parametrize("kind", [Base, Overrides])
def test_methods_that_take_params_are_given_the_adapted(kind):
    model = kind()
    adapted = AdaptedModel(model, adapted_of(model))
    merged = tied_lora.merge(adapted.adapted)
    expected = model.generate(IDS, steps=4, params=merged)
    np.testing.assert_array_equal(adapted.generate(IDS, steps=4), expected)
    np.testing.assert_array_equal(adapted.generate(IDS, steps=4, params=adapted.params), expected)
    assert not np.array_equal(expected, model.generate(IDS, steps=4))


def test_nothing_is_traced_again_for_the_same_shapes_and_settings(model, adapted):
    first = adapted.generate(IDS, steps=2)
    count = adapted.traced
    np.testing.assert_array_equal(adapted.generate(IDS + 0, steps=2), first)
    other = adapted.replace(adapted_of(model, seed=5))
    assert not np.array_equal(other(IDS)["logits"], adapted(IDS)["logits"])
    other.generate(IDS, steps=2)
    assert adapted.traced == count + 1  # the one call of the model itself
    adapted.generate(IDS, steps=3)
    assert adapted.traced == count + 4
    assert model.traced == 0


def test_a_changed_setting_is_seen(adapted):
    plain = adapted(IDS)["logits"]
    adapted.config.scale = 2.0
    np.testing.assert_allclose(adapted(IDS)["logits"], 2 * plain, rtol=1e-5)
    adapted.config = Config(3.0)
    np.testing.assert_allclose(adapted(IDS)["logits"], 3 * plain, rtol=1e-5)
    adapted.scaled(4.0)
    np.testing.assert_allclose(adapted(IDS)["logits"], 4 * plain, rtol=1e-5)


def test_a_setting_without_a_hash_and_calls_that_are_not_compiled(model, adapted):
    expected = model.generate(IDS, steps=2, params=adapted.merge())
    plain = AdaptedModel(model, adapted.adapted, jit=False)
    np.testing.assert_array_equal(plain.generate(IDS, steps=2), expected)
    before = plain.traced
    plain.generate(IDS, steps=2)
    assert plain.traced == before + 2
    np.testing.assert_array_equal(adapted.generate(IDS, steps=[1, 1]), expected)
    before = adapted.traced
    for _ in range(2):  # A set has no hash.
        np.testing.assert_array_equal(adapted.generate(IDS, steps={2}), expected)
    assert adapted.traced == before + 4


def test_what_does_not_run_with_params_is_the_models_own(model, adapted):
    assert adapted.config is model.config
    assert adapted.init_weights(None, (1,)) is None
    half = adapted.to_float16(adapted.merge())
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float16")}
    assert {"generate", "config", "adapted", "replace"} <= set(dir(adapted))


def test_the_models_own_params_cannot_run(model, adapted):
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        adapted.score(IDS)
    with pytest.raises(AttributeError, match="push_to_hub would send the model's own params"):
        adapted.push_to_hub("name")
    with pytest.raises(TypeError, match="params is a dict; expected the Adapted"):
        adapted(IDS, params=model.params)
    with pytest.raises(TypeError, match="params is a dict; expected the Adapted"):
        adapted.generate(IDS, 1, model.params)
    with pytest.raises(TypeError, match="params is a dict; expected the Adapted"):
        adapted.save_pretrained([], model.params)
    model.score(IDS)  # The model itself is as it was.


def test_saving_writes_the_merged_model(adapted):
    where: list[Any] = []
    adapted.save_pretrained(where)
    jax.tree.map(np.testing.assert_array_equal, where[0], adapted.merge())
    assert adapted.merge(dtype=jnp.bfloat16)["proj"]["kernel"].dtype == jnp.bfloat16


def test_the_adapted_is_replaced_and_set(model, adapted):
    second = adapted_of(model, seed=5)
    other = adapted.replace(second)
    assert (other.adapted, other.params) == (second, second)
    assert adapted.adapted is not second
    adapted.adapted = second
    np.testing.assert_array_equal(adapted(IDS)["logits"], other(IDS)["logits"])
    for name in ("adapted", "params"):
        with pytest.raises(TypeError, match=f"{name} is a dict; expected the Adapted"):
            setattr(adapted, name, model.params)
    with pytest.raises(TypeError, match="adapted is a dict; expected the Adapted"):
        adapted.replace(model.params)


def test_it_is_a_pytree_of_the_adapteds_leaves(adapted):
    assert jax.tree.leaves(adapted) == jax.tree.leaves(adapted.adapted)
    count: list[int] = []

    @jax.jit
    def logits(model: AdaptedModel, ids: Any) -> Any:
        count.append(1)
        return model(ids)["logits"]

    expected = adapted(IDS)["logits"]
    for _ in range(2):
        np.testing.assert_allclose(logits(adapted, IDS), expected, rtol=1e-5, atol=1e-5)
    logits(adapted.replace(adapted.adapted.eval()), IDS)
    assert len(count) == 1

    def loss(adapters: Any, model: AdaptedModel) -> Any:
        return model.replace(model.adapted.replace(adapters=adapters))(IDS)["logits"].sum()

    grads = jax.grad(loss)(adapted.adapted.adapters, adapted)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    with pytest.raises(TypeError, match=r"give them its .model, and params=model.adapted"):
        tied_lora.explain(lambda model: model(IDS), adapted)
    tied_lora.explain(adapted.model, IDS, params=adapted.adapted).assert_tied()


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_and_pickles_give_the_same(adapted, again):
    expected = adapted(IDS)["logits"]
    other = again(adapted)
    assert repr(other) == repr(adapted) == "AdaptedModel(Base, Adapted(2 groups adapted, rank 2))"
    np.testing.assert_array_equal(other(IDS)["logits"], expected)
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        other.score(IDS)


def test_bad_arguments(model):
    good = adapted_of(model)
    with pytest.raises(TypeError, match="adapted is a dict; expected the Adapted that wrap"):
        AdaptedModel(model, model.params)
    with pytest.raises(TypeError, match="object has no method that takes params="):
        AdaptedModel(object(), good)
    with pytest.raises(TypeError, match="the class Base has no method that takes params="):
        AdaptedModel(Base, good)
    with pytest.raises(TypeError, match=r"is an AdaptedModel; use its .replace\(adapted\)"):
        AdaptedModel(AdaptedModel(model, good), good)
    with pytest.raises(ValueError, match="on_dense='no'"):
        AdaptedModel(model, good, on_dense="no")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute '_steps'"):
        AdaptedModel(model, good)._steps  # noqa: B018
    with pytest.raises(AttributeError, match="'Base' object has no attribute 'nothing'"):
        AdaptedModel(model, good).nothing  # noqa: B018
    with pytest.raises(TypeError, match="missing a required argument: 'ids'"):
        AdaptedModel(model, good)()


def test_a_model_whose_params_cannot_be_set_is_refused(model):
    class Fixed(Base):
        params = property(lambda self: self.__dict__["own"], lambda self, x: self._first(x))

        def _first(self, params: Any) -> None:
            if "own" in self.__dict__:
                raise AttributeError("fixed")
            self.__dict__["own"] = params

    with pytest.raises(
        TypeError, match=r"Fixed\.params cannot be set, so its own params could run"
    ):
        AdaptedModel(Fixed(), adapted_of(model))
