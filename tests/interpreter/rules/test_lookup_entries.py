"""What picks entries and keeps no axis: served low rank, and said to be no lookup of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers.oracle import array, check, numbers, only, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
IDS = numbers(2, 3, below=8, seed=5)
WINDOWS = lax.GatherDimensionNumbers(
    offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
)
FORMS = {
    "rows and columns": lambda w: w[IDS, jnp.array([0, 3, 5])[None]],
    "batched": lambda w: jax.vmap(lambda row, i: row[i])(w, numbers(8, 2, below=6, seed=6)),
    "along axis": lambda w: jnp.take_along_axis(w, numbers(3, 6, below=8), axis=0),
    "along columns": lambda w: jnp.take_along_axis(w, numbers(8, 3, below=6), axis=1),
    "windows": lambda w: lax.gather(w, jnp.array([[1, 2], [6, 4]]), WINDOWS, (2, 3), mode="clip"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_it_is_served_and_says_nothing_of_axes(form):
    (read,) = only(check(lambda params: form(params["embed"]["embedding"]), TABLE), "other")
    assert (read.site.rows, read.site.cols, read.site.batch) == ((), (), ())
