"""The models of both libraries, made once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest

from tests.against_torch.torch_models import KINDS, Pair, pair


@contextlib.contextmanager
def usual_rules() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    with usual_rules():
        return {name: pair(name, tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.fixture(params=KINDS)
def both(request, pairs) -> Pair:
    return pairs[request.param]
