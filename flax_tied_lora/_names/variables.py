"""Params that are a list of variables, as Keras has them: a dict by their paths, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax_tied_lora._tree.paths import nearby


def by_path(model: Any) -> dict[str, Any]:
    """Returns the values of a model's variables by their paths: params whose leaves have names.

    ::

        params = by_path(model)  # {"decoder_block_0/attention/query/kernel": ..., ...}

        def logits(params, tokens):
            return model.stateless_call(in_order(model, params), frozen, tokens)[0]

    Args:
      model: a Keras model, whose ``trainable_variables`` are meant, or variables: what has a
        ``path`` and a ``value``.

    Raises:
      TypeError: ``model`` is neither.
      ValueError: two variables have one path.
    """
    return {path: variable.value for path, variable in _variables("by_path", model).items()}


def in_order(model: Any, params: Mapping[str, Any]) -> list[Any]:
    """Returns the values of such params as the list that ``model.stateless_call`` takes.

    Args:
      model: as in `by_path`.
      params: a value for the path of each variable: what `by_path` returns, traced or trained.

    Raises:
      TypeError: ``model`` is no such model, or ``params`` no mapping.
      ValueError: two variables have one path, or the paths in ``params`` are not theirs.
    """
    paths = list(_variables("in_order", model))
    if not isinstance(params, Mapping):
        raise TypeError(
            f"in_order: expected params by path, as by_path returns them, got "
            f"{type(params).__name__}; an Adapted becomes such params inside of adapt(fn), and in "
            "merge(adapted)"
        )
    for path in paths:
        if path not in params:
            near = ", ".join(map(repr, nearby(path, params)))
            raise ValueError(f"in_order: params have no {path!r}; nearby: {near or 'nothing'}")
    for path in params:
        if path not in paths:
            near = ", ".join(map(repr, nearby(path, paths)))
            raise ValueError(f"in_order: {path!r} is no variable of the model; nearby: {near}")
    return [params[path] for path in paths]


def _variables(what: str, model: Any) -> dict[str, Any]:
    variables = getattr(model, "trainable_variables", model)
    if not isinstance(variables, Iterable):
        raise TypeError(
            f"{what}: expected a model with trainable_variables, or variables, got "
            f"{type(model).__name__}"
        )
    named: dict[str, Any] = {}
    for variable in variables:
        path = getattr(variable, "path", None)
        if not isinstance(path, str):
            raise TypeError(
                f"{what}: expected variables with a path, as Keras's have one, got "
                f"{type(variable).__name__}"
            )
        if path in named:
            raise ValueError(
                f"{what}: two variables have the path {path!r}; give their layers names of their "
                "own, as in Dense(8, name=...)"
            )
        named[path] = variable
    return named
