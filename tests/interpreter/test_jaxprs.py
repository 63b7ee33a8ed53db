"""Jaxprs in the two forms that releases of JAX have for them."""

from __future__ import annotations

import runpy

import jax
import jax.extend.core as core
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora._interpreter import jaxprs
from flax_tied_lora._interpreter.jaxprs import Jaxpr, body, closed, constants, jaxpr_as_fun, opened

TABLE = np.arange(3, dtype=np.float32)
TRACED = jax.make_jaxpr(lambda x: jnp.sin(x) * TABLE)(jnp.ones(3))


def test_a_program_and_its_constants_are_read():
    (found,) = constants(TRACED)
    np.testing.assert_array_equal(found, TABLE)
    assert isinstance(body(TRACED), Jaxpr)
    assert len(body(TRACED).invars) == 1
    assert body(body(TRACED)) is body(TRACED)


def test_constants_are_opened_into_operands():
    inner, values = opened(TRACED)
    assert not inner.constvars
    assert not constants(inner)
    (found,) = jaxpr_as_fun(closed(inner))(*values, jnp.ones(3))
    np.testing.assert_allclose(found, np.sin(1) * TABLE, rtol=1e-6)


@pytest.mark.parametrize("high", [False, True])
def test_what_is_opened_stays_high(high):
    inner = body(TRACED)
    jaxpr = Jaxpr(
        (), [*inner.constvars, *inner.invars], inner.outvars, inner.eqns, inner.effects,
        inner.debug_info._replace(arg_names=None), is_high=high,
    )  # fmt: skip
    assert opened(closed(jaxpr))[0].is_high == high


def test_another_jax_extend_is_said(monkeypatch):
    monkeypatch.delattr(core, "Var")
    said = rf"jax {jax.__version__} has another jax.extend.core .*'Var'.*tested on is 0\.12\.0\.1"
    with pytest.raises(ImportError, match=said):
        runpy.run_path(jaxprs.__file__)


def test_the_older_form_is_asked_for_only_where_it_is_one(monkeypatch):
    one_form = hasattr(Jaxpr, "consts")
    if one_form:
        monkeypatch.delattr(core, "ClosedJaxpr", raising=False)
    forms = runpy.run_path(jaxprs.__file__)["PROGRAMS"]
    assert len(set(forms)) == (1 if one_form else 2)
