"""The loss on eight host devices: tokens and vocabulary split, Auto and Explicit, and by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.collectives import collectives
from tests.helpers.compiling import as_shipped
from tests.helpers.full_logits import assert_same, compiled, cross_entropy
from tests.helpers.oracle import array, numbers, wrapped

V, D, R = 512, 16, 2
ADAPTED = wrapped({"embed": {"embedding": array(V, D, seed=1) / 4}}, ["embed"], r=R)
HIDDEN, LABELS = array(8, 32, D, seed=2), numbers(8, 32, below=V).at[1, :3].set(-100)
DATA, VOCABULARY = "data", "model"


def mesh(kind: AxisType) -> Any:
    return jax.make_mesh((2, 4), (DATA, VOCABULARY), axis_types=(kind, kind))


def step(loss: Any) -> Any:
    """Returns a function of adapters, the rest, and data: a loss and its gradients."""

    def program(params: Any, hidden: Any, labels: Any) -> Any:
        return loss(hidden, params["embed"]["embedding"], labels)

    def run(adapters: Any, adapted: Any, hidden: Any, labels: Any) -> Any:
        def of(adapters: Any, hidden: Any) -> Any:
            served = tied_lora.adapt(program, on_dense="error")
            return served(adapted.replace(adapters=adapters), hidden, labels)

        return jax.value_and_grad(of, (0, 1))(adapters, hidden)

    return run


@functools.cache
def expected() -> Any:
    return compiled(step(cross_entropy), ADAPTED.adapters, ADAPTED, HIDDEN, LABELS)


def placed(mesh: Any) -> Any:
    """Returns the operands of a step, tokens split over one axis, the vocabulary over another."""

    def put(spec: Any, x: Any) -> Any:
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    def leaf(x: Any) -> Any:
        return put(jax.P(VOCABULARY if x.ndim and x.shape[0] == V else None), x) if x.ndim else x

    adapted = jax.tree.map(leaf, ADAPTED)
    return adapted.adapters, adapted, put(jax.P(DATA), HIDDEN), put(jax.P(DATA), LABELS)


def test_auto_axes_move_nothing_of_the_tables_size():
    operands = placed(mesh(AxisType.Auto))
    loss = functools.partial(linear_cross_entropy, chunk_size=64)
    program = as_shipped(jax.jit(step(loss)).lower(*operands))
    assert_same(jax.device_get(program(*operands)), jax.device_get(expected()), 5e-5)
    moved = collectives(program)
    assert max(c.size for c in moved) < V * D / 4, moved
    assert max(c.times for c in moved) == 4  # chunks of 64 tokens
    assert [c.times for c in moved if c.shape == (V // 4, R)] == [1]  # summed over devices once


@pytest.mark.parametrize("width", [None, DATA])
@pytest.mark.parametrize("tokens", [None, DATA])
def test_explicit_axes(tokens, width):
    """The width may be split over the mesh axis that tokens are split over, too."""
    loss = functools.partial(linear_cross_entropy, chunk_size=64)

    def cut(x: Any) -> Any:
        if x.ndim == 0 or x.shape[-1] != D:
            return x
        return jax.device_put(x, on_mesh(jax.P(x.sharding.spec[0], width)))

    with jax.set_mesh(mesh(AxisType.Explicit)) as _:
        on_mesh = functools.partial(jax.NamedSharding, jax.sharding.get_mesh())
        adapters, adapted, *data = placed(jax.sharding.get_mesh())
        tables = jax.tree.map(cut, (adapters, adapted))
        data = jax.device_put(data, on_mesh(jax.P(tokens)))
        ours = jax.jit(step(loss))(*tables, *data)
    assert_same(jax.device_get(ours), jax.device_get(expected()), 5e-5)


def by_hand(hidden: Any, table: Any, labels: Any, *, check_vma: bool = True, **options: Any) -> Any:
    """The loss inside a `shard_map` over both axes, the mean over devices with their own data."""

    def local(hidden: Any, table: Any, labels: Any) -> Any:
        out = linear_cross_entropy(
            hidden, table, labels, axis_name=VOCABULARY, reduction="sum", **options
        )
        return jax.lax.psum(out, DATA)

    total = jax.shard_map(
        local, mesh=mesh(AxisType.Auto), in_specs=(jax.P(DATA), jax.P(VOCABULARY), jax.P(DATA)),
        out_specs=jax.P(), check_vma=check_vma,
    )(hidden, table, labels)  # fmt: skip
    return total / jnp.sum(labels != -100).astype(jnp.float32)


def test_shard_map_with_the_name_of_the_vocabularys_axis():
    ours = jax.jit(step(by_hand))(ADAPTED.adapters, ADAPTED, HIDDEN, LABELS)
    assert_same(jax.device_get(ours), jax.device_get(expected()), 5e-5)


def test_all_options_over_a_split_vocabulary():
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_soft_cap": 2.0}
    table = ADAPTED.params["embed"]["embedding"]
    ours = jax.jit(
        jax.value_and_grad(functools.partial(by_hand, labels=LABELS, **options), (0, 1))
    )(HIDDEN, table)
    plain = functools.partial(cross_entropy, labels=LABELS, **options)
    theirs = compiled(jax.value_and_grad(plain, (0, 1)), HIDDEN, table)
    assert_same(jax.device_get(ours), jax.device_get(theirs), 5e-5)


def test_differentiated_inside_of_a_shard_map():
    table = ADAPTED.params["embed"]["embedding"]

    def local(hidden: Any, table: Any, labels: Any) -> Any:
        def mean(hidden: Any, table: Any) -> Any:
            total = linear_cross_entropy(hidden, table, labels, reduction="sum", chunk_size=40)
            return jax.lax.pmean(total, (DATA, VOCABULARY))

        return jax.value_and_grad(mean, (0, 1))(hidden, table)

    both = (DATA, VOCABULARY)
    ours = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(AxisType.Auto),
            in_specs=(jax.P(both), jax.P(), jax.P(both)),
            out_specs=(jax.P(), (jax.P(both), jax.P())),
        )
    )(HIDDEN, table, LABELS)
    plain = functools.partial(cross_entropy, labels=LABELS, reduction="sum")
    theirs = compiled(jax.value_and_grad(plain, (0, 1)), HIDDEN, table)
    eighth = jax.tree.map(lambda x: np.asarray(x) / 8, theirs)
    assert_same(jax.device_get(ours), eighth, 5e-5)


def test_without_types_of_devices_gradients_are_refused():
    table = ADAPTED.params["embed"]["embedding"]
    run = functools.partial(by_hand, labels=LABELS, check_vma=False)
    assert_same(run(HIDDEN, table), cross_entropy(HIDDEN, table, LABELS))
    with pytest.raises(ValueError, match=r"check_vma=False.*use check_vma=True"):
        jax.grad(run)(HIDDEN, table)
