"""What the tests of model families share: traces, adapted weights, distances."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers import compiling
from tests.models.families import FAMILIES, Case, build

# LongT5's global attention gives one_hot numbers that are no integers.
FLOAT_ONE_HOT = "ignore:jax.nn.one_hot input should be integer-typed:DeprecationWarning"
model_tests = [pytest.mark.models, pytest.mark.filterwarnings(FLOAT_ONE_HOT)]
RANK = 3
# Quickly rather than well: each program runs once or twice.
compiled = functools.partial(jax.jit, compiler_options=compiling.quick())

each_family = pytest.mark.parametrize("name", FAMILIES)


def some_by_default(names: Iterable[str], chosen: Collection[str] | None = None) -> Any:
    """Returns a parametrisation of which some families are run by default, and the slow tests all.

    Args:
      names: of families.
      chosen: those that are run by default; else those that are not much like another.
    """
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.slow] if slow else [])
            for name in names
            for slow in [FAMILIES[name].slow if chosen is None else name not in chosen]
        ],
    )


@functools.cache
def sites_of(name: str) -> tied_lora.CallSites:
    case = build(name)
    return tied_lora.trace(case.call, case.params, case.tokens)


@functools.cache
def adapted_of(name: str) -> tied_lora.Adapted:
    """The table and the attention projections, with a delta that is not zero."""
    case = build(name)
    return wrapped(case, case.params, sites_of(name))


@functools.cache
def explanation_of(name: str) -> tied_lora.Explanation:
    case = build(name)
    return tied_lora.explain(case.call, adapted_of(name), case.tokens)


def wrapped(case: Case, params: Any, sites: Any) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(r=RANK, lora_alpha=6, target_modules=case.family.targets)
    # The factors that `wrap` draws would be thrown away: it is given shapes.
    shapes = jax.eval_shape(lambda: params)
    adapted = tied_lora.wrap(shapes, config, sites=sites, ties=case.ties)
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))
    stored = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], adapted.params)
    rng = np.random.default_rng(3)
    return adapted.replace(
        params=stored,
        scaling=jax.tree.map(lambda _: jnp.float32(6 / RANK), adapted.scaling),
        adapters=jax.tree.map(
            lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), adapted.adapters
        ),
    )


def far(found: Any, expected: Any) -> float:
    """Returns the distance of two arrays, relative to the second one's norm."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
