"""A small adapted table, and what is asked of it, for the tests of control flow."""

from __future__ import annotations

import jax.numpy as jnp

from tests.helpers.oracle import array, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(3, 6, seed=2)
IDS = jnp.array([1, 5, 1])


def table(params):
    return params["embed"]["embedding"]


def served(explained):
    return [(r.site.operation, r.served) for r in explained.reads]
