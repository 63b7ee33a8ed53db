"""per_example: what is mapped, what is shared, and in what form results come back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.compiling import as_shipped
from tests.helpers.small_models import wrapped

PARAMS = {"up": {"kernel": jnp.arange(12.0).reshape(3, 4) / 8}}
OWN = [wrapped(PARAMS, ["up"], seed=seed) for seed in range(3)]
STACKED = tied_lora.stack(OWN)
SLOTS = [2, 0, 1, 2]
SELECTED = tied_lora.select(STACKED, SLOTS)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
EXPECTED = jnp.stack(
    [x @ tied_lora.merge(OWN[i])["up"]["kernel"] for i, x in zip(SLOTS, X, strict=True)]
)


def up(params: Any, x: Any) -> Any:
    return x @ params["up"]["kernel"]


def each(fn: Any, *args: Any, **axes: Any) -> Any:
    return tied_lora.per_example(tied_lora.adapt(fn, on_dense="error"), **axes)(*args)


def close(found: Any, expected: Any = EXPECTED) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_sees_one_example_in_a_batch_of_one():
    shapes = []

    def fn(params, x):
        shapes.append(x.shape)
        return up(params, x)

    close(each(fn, SELECTED, X))
    assert shapes == [(1, 3)]


def test_the_batch_is_where_in_axes_and_out_axes_say():
    def fn(params, data, w):
        out = up(params, data["late"][:, 0].T)
        return {"out": out.T * w, "copy": data["late"]}

    data = {"late": X.T[:, None, :], "first": X}
    axes = {"in_axes": (0, {"late": 2, "first": 0}, None), "out_axes": {"out": -1, "copy": 2}}
    found = each(fn, SELECTED, data, jnp.float32(2), **axes)
    close(found["out"].T, 2 * EXPECTED)
    close(found["copy"], data["late"])


def test_axes_of_the_adapters_are_those_of_vmap():
    axes = ({"params": tied_lora.adapter_axes(SELECTED), "x": 0},)
    close(each(lambda v: up(v["params"], v["x"]), {"params": SELECTED, "x": X}, in_axes=axes))


class Model:
    """No pytree: it has to arrive as itself."""

    scale = 2.0


def test_what_has_no_axes_is_shared_and_comes_back_so():
    model = Model()

    def fn(params, x, index, *, mode, flags, weight):
        assert (mode, flags) == (model, ["cache"])
        assert jnp.ndim(index) == 0
        y = weight * mode.scale * up(params, x)
        return {"y": y, "index": index + 1, "sum": y.sum(), "mode": mode, "none": None}

    @jax.jit
    def run(selected, index):
        found = tied_lora.per_example(tied_lora.adapt(fn))(
            selected, X, index, mode=model, flags=["cache"], weight=jnp.full((4, 1), 0.5)
        )
        assert found.pop("mode") is model
        return found

    found = run(SELECTED, jnp.int32(3))
    close(found["y"])
    assert (found["index"].shape, int(found["index"]), found["none"]) == ((), 4, None)
    close(found["sum"], EXPECTED.sum(1))


def test_what_is_shared_keeps_its_gradient_and_stays_shared_in_a_vmap_around_it():
    def run(w):
        return each(lambda p, x, w: (up(p, x), jnp.sum(w**2)), SELECTED, X, w, in_axes=(0, 0, None))

    out, total = run(jnp.ones(2))
    close(out)
    assert total.shape == ()
    close(jax.grad(lambda w: run(w)[1])(jnp.ones(2)), 2 * jnp.ones(2))
    out, total = jax.vmap(run)(jnp.ones((4, 2)))
    assert (out.shape, total.shape) == ((4, 4, 4), (4,))


def test_each_example_gets_a_random_key_of_its_own():
    keys = jax.random.split(jax.random.key(0), 4)

    def fn(params, x, key):
        return up(params, x) + jax.random.normal(key, (1, 4))

    noise = jnp.stack([jax.random.normal(key, (4,)) for key in keys])
    close(each(fn, SELECTED, X, keys), EXPECTED + noise)
    one = jax.random.normal(keys[0], (4,))
    close(each(fn, SELECTED, X, keys[0]), EXPECTED + one[None])


def test_dropout_differs_between_examples():
    adapted = wrapped(PARAMS, ["up"], lora_dropout=0.5)
    selected = tied_lora.select(tied_lora.stack([adapted]), [0] * 16).train(jax.random.key(1))
    found = each(up, selected, jnp.ones((16, 3)))
    assert len(np.unique(np.asarray(found), axis=0)) > 3
    calm = each(up, selected.eval(), jnp.ones((16, 3)))
    assert len(np.unique(np.asarray(calm), axis=0)) == 1


def test_an_adapter_for_all_and_one_for_each():
    def fn(each, all_, x):
        return up(each, x) - up(all_, x)

    one = tied_lora.select(STACKED, 1)
    close(each(fn, SELECTED, one, X), EXPECTED - up(tied_lora.merge(OWN[1]), X))


# Compiled


def test_temporary_memory_grows_by_no_more_than_the_gathered_factors():
    vocab, width, rank, examples, slots = 2048, 32, 4, 8, 16
    numbers = np.random.default_rng(0)
    params = {
        "embed": {"embedding": jnp.asarray(numbers.normal(size=(vocab, width)), jnp.float32)},
        "up": {"kernel": jnp.asarray(numbers.normal(size=(width, width)), jnp.float32)},
    }

    def step(params, tokens, tied):
        x = params["embed"]["embedding"][tokens]
        x = jnp.tanh(x @ params["up"]["kernel"])
        return x @ params["embed"]["embedding"].T if tied else x

    one = wrapped(params, ["embed", "up"], r=rank)
    stacked = tied_lora.stack([one], capacity=slots)
    tokens = np.arange(examples * 2, dtype=np.int32).reshape(examples, 2)

    def temporary(fn, adapted, tied):
        made = as_shipped(jax.jit(functools.partial(fn, tied=tied)).lower(adapted, tokens))
        return made.memory_analysis().temp_size_in_bytes, made.as_text()

    selected = tied_lora.select(stacked, np.arange(examples))
    gathered = examples * sum(x.nbytes for x in jax.tree.leaves(one.adapters))
    for tied in (True, False):
        fn = tied_lora.adapt(step, on_dense="error")
        each = tied_lora.per_example(lambda a, x, tied, fn=fn: fn(a, x, tied))
        alone, _ = temporary(fn, one, tied)
        many, text = temporary(each, selected, tied)
        assert many - alone <= gathered
        assert f"f32[{examples},{vocab},{width}]" not in text  # a table for each example
        if not tied:  # only rows are picked: the factor over the vocabulary is not gathered
            assert many - alone < gathered / 8


# Refusals


CASES = [
    ("nothing selected", lambda: each(up, OWN[0], X), "no argument has an adapter for each"),
    ("one for all", lambda: each(up, tied_lora.select(STACKED, 0), X),
     "no argument has an adapter for each"),
    ("two sizes", lambda: each(lambda a, b, x: x, SELECTED, tied_lora.select(STACKED, [0]), X),
     "adapters for 1 and 4 examples"),
    ("another batch", lambda: each(lambda p, v: 0, SELECTED, {"x": X[:3]}),
     r"argument '1/x' is float32\[3, 3\]; axis 0 has 3 entries, and there are 4 examples.*in_axes"),
    ("no such axis", lambda: each(up, SELECTED, X, in_axes=(0, 2)), "which has no axis 2"),
    ("axes for others", lambda: each(up, SELECTED, X, in_axes=(0, 0, 0)), "for 3 positional"),
    ("no batch of one", lambda: each(lambda p, x: up(p, x)[0], SELECTED, X),
     r"result '' of one example is float32\[4\]; axis 0 is not a batch of one.*out_axes"),
    ("not shared", lambda: each(lambda p, x: {"y": up(p, x)}, SELECTED, X, out_axes=None),
     "result 'y' differs between examples, and out_axes has None"),
    ("no such result axis", lambda: each(up, SELECTED, X, out_axes=5), "which has no axis 5"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(case, words):
    with pytest.raises(ValueError, match=rf"per_example: .*{words}"):
        case()
