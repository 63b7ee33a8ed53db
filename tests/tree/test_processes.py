"""What one process does for several, where there is one only; `tests/whole/test_processes.py`
starts several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora._tree import processes


def test_arrays_of_one_process_are_not_spread():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.device_put(jnp.arange(8), jax.NamedSharding(mesh, jax.P("x")))
    tree = {"a": array, "b": 3, "c": None}
    assert not processes.spread(tree)
    assert processes.gathered(tree)["a"] is array
    processes.refuse_spread("save_adapter", "a", tree)


def test_a_traced_array_is_not_asked_where_it_is():
    jax.eval_shape(lambda x: processes.refuse_spread("save", "x", x), jnp.ones(2))


def test_the_leaf_that_is_spread_is_named(monkeypatch):
    monkeypatch.setattr(processes, "spread", lambda leaf: True)
    with pytest.raises(ValueError, match=r"^save_adapter: leaf 'a/b' is spread .* 1 processes, ex"):
        processes.refuse_spread("save_adapter", "a/b", jnp.ones(2))


def test_one_process_does_it_itself():
    done = []
    processes.in_one_process(lambda: done.append(1), AssertionError)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        processes.in_one_process(lambda: 1 / 0, AssertionError)


@pytest.mark.parametrize(("index", "error"), [(0, ZeroDivisionError), (1, TimeoutError)])
def test_a_failure_is_raised_in_all(monkeypatch, index, error):
    """The first process raises what it met, the others that it failed."""
    sent = []

    def broadcast(value):
        sent.append(int(value))
        return np.array(1)  # what the first process sends where it failed

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    with pytest.raises(error):
        processes.in_one_process(lambda: 1 / 0, TimeoutError)
    assert sent == ([1] if index == 0 else [0])


def test_numbers_that_differ_between_processes(monkeypatch):
    assert processes.differing([1, 2, 3]).tolist() == [False] * 3
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda x: np.stack([x, [1, 5, 3]])
    )
    assert processes.differing([1, 2, 3]).tolist() == [False, True, False]
    assert processes.differing([]).tolist() == []
