"""`grow_vocabulary`: an entry for each new token in every leaf of the vocabulary; ties stay."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.tying import warn_of_dropped
from flax_tied_lora._ties.find import all_groups, ties_among
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._tree.boxes import in_place
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.keys import key_number, typed_key, uncommitted
from flax_tied_lora._tree.paths import describe, flatten, is_marker, refuse_markers
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._vocabulary.adapters import grown_adapters
from flax_tied_lora._vocabulary.leaves import WHAT, vocabulary_axes
from flax_tied_lora._vocabulary.rows import grown


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What `grow_vocabulary` did.

    Attributes:
      n_tokens: how many tokens there are now; their ids are 0 to ``n_tokens - 1``.
      size: how many rows the table has now, padding included: what the model's config must have
        for ``vocab_size``.
      old_tokens: how many tokens there were.
      old_size: how many rows the table had.
      axes: the vocabulary's axis of every leaf that was grown, by path, the input embedding first.
    """

    n_tokens: int
    size: int
    old_tokens: int
    old_size: int
    axes: Mapping[str, int]

    @property
    def new_tokens(self) -> range:
        """Ids of the new tokens: a `LoraConfig`'s ``trainable_token_indices``."""
        return range(self.old_tokens, self.n_tokens)

    @property
    def padding(self) -> range:
        """Ids that are no token's, and must never be sampled."""
        return range(self.n_tokens, self.size)

    def mask(self, logits: jax.Array) -> jax.Array:
        """Returns logits in which padding has no probability.

        Args:
          logits: [..., size], floating point.

        Raises:
          ValueError: the last axis is of another size.
        """
        if logits.shape[-1:] != (self.size,):
            raise ValueError(
                f"Vocabulary.mask: logits are {describe(logits)}; expected [..., {self.size}]"
            )
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(ids < self.n_tokens, logits, -jnp.inf)


def grow_vocabulary(  # noqa: PLR0913 - options, all by keyword
    params: Any, n_tokens: int, *, old_tokens: int | None = None,
    pad_to_multiple_of: int | None = None, init: Any = "mean",
    leaves: Mapping[str, int | None] | None = None, ties: Any = "auto",
    sites: CallSites | None = None, rng: jax.Array | None = None,
) -> tuple[Any, Vocabulary]:  # fmt: skip
    """Returns params with room for more tokens, and what was done.

    Grown are the input embedding, all that is tied to it, an output projection of its own, and
    biases of the logits; what is one array stays one. Old rows keep their values, all leaves their
    dtypes, boxes and shardings. The model has to be made anew, its config's ``vocab_size`` being
    the `Vocabulary`'s ``size``; an optimizer's state, too.

    Follows ``resize_token_embeddings`` of transformers, which shrinks as well; this refuses to.

    Of an `Adapted` the adapters grow too: rows of factors by zeros, so that a new token has no
    delta; full copies by the same rows as the frozen table; DoRA's magnitudes so that old tokens
    stay as they are. Replaced rows keep their ids.

    Args:
      params: as `wrap` takes them, also of `jax.ShapeDtypeStruct`; or an `Adapted`.
      n_tokens: how many tokens there are to be: ``len(tokenizer)``.
      old_tokens: how many there are; default: as many as the table has rows. With fewer, the rows
        behind them, which are padding, are made anew and used first.
      pad_to_multiple_of: the number of rows becomes a multiple of it. None: no padding is added.
      init: what new rows are. ``"mean"``: draws from a normal distribution with the old rows' mean
        and 1e-9 times their covariance, as with transformers' ``mean_resizing=True``. A function
        ``init(key, shape, dtype)``, such as ``jax.nn.initializers.normal(0.02)``, called with the
        shape [new rows, ...]; biases then start as zeros. An array with a row for each new token,
        for the input embedding and all that is tied to it; other leaves, and padding, then start
        as with ``"mean"``. A dict from leaf path to one of these, ``"mean"`` for the rest.
      leaves: for leaves that are not found by name, or that only look as if they belonged to the
        vocabulary: path -> its vocabulary axis, or None for one that stays as it is.
      ties, sites: as in `wrap`; of an `Adapted`, the ties are those of its plan.
      rng: key for new rows, default ``jax.random.key(0)``; each leaf's path is folded into it.

    Returns:
      The params, or the `Adapted`; and a `Vocabulary`. What was given stays as it is.

    Raises:
      ValueError: there are more tokens already; it is not clear whether a leaf belongs to the
        vocabulary, or one that does is stored quantised; a sharded axis cannot be split so; a shape
        is wrong.
      TypeError: an argument is of the wrong type.

    Example::

      params, vocabulary = tied_lora.grow_vocabulary(params, len(tokenizer), pad_to_multiple_of=64)
      config = LoraConfig(r=8, target_modules=["q_proj"],
                          trainable_token_indices=list(vocabulary.new_tokens))
      adapted = tied_lora.wrap(params, config)
    """
    rng = uncommitted(jax.random.key(0) if rng is None else typed_key(WHAT, rng))
    refuse_models(
        WHAT, params,
        "; grow its state, nnx.state(module, nnx.Param), or tied_lora.nnx.adapted(module), and put "
        "it into a module of the new size, by nnx.update or tied_lora.nnx.from_adapted",
    )  # fmt: skip
    adapted = params if isinstance(params, Adapted) else None
    old, treedef = flatten(params if adapted is None else adapted.params)
    if adapted is None:
        refuse_markers(WHAT, old, "pass the Adapted")
        tied = ties_among(old, ties, sites=sites)
    elif isinstance(ties, str) and ties == "auto":
        tied = [g.tie() for g in adapted.plan.groups]
    else:
        raise TypeError(f"{WHAT}: ties={ties!r} with an Adapted, whose plan has them; leave it out")
    groups = all_groups(old, tied)
    table, axes = vocabulary_axes(old, groups, sites, dict(leaves or {}))
    embedding = next(g for g in groups if table in g.paths)
    axes = {p: axes[p] for p in [*embedding.paths, *axes]}
    old_size = old[embedding.key].shape[axes[embedding.key]]
    vocabulary = _vocabulary(n_tokens, old_tokens, old_size, pad_to_multiple_of, axes)
    _refuse_quantized(old, axes)
    for group in groups:
        warn_of_dropped(WHAT, group, old, 3)
    inits = _inits(init, old, axes, embedding)

    new = dict(old)
    for group in (g for g in groups if g.key in axes):
        key = jax.random.fold_in(rng, key_number(group.key))
        first = grown(
            old[group.key], axes[group.key], vocabulary.old_tokens, vocabulary.size,
            inits[group.key], key, path=group.key,
        )  # fmt: skip
        for member in group.members:
            if not is_marker(old[member.path]):
                new[member.path] = _as_member(first, member, old[member.path])
    params = jax.tree.unflatten(treedef, list(new.values()))
    if adapted is not None:
        params = grown_adapters(adapted, params, vocabulary.old_tokens, axes)
    return params, vocabulary


def _refuse_quantized(leaves: Mapping[str, Any], axes: Mapping[str, int]) -> None:
    for path in axes:
        if is_quantized(leaves[path]):
            raise ValueError(
                f"{WHAT}: {path!r} is stored quantised, and new rows would have to be, too; grow "
                "dequantize(params), and quantize the result"
            )


def _vocabulary(
    n_tokens: Any, old_tokens: Any, old_size: int, multiple: Any, axes: Mapping[str, int]
) -> Vocabulary:
    count = _number("n_tokens", n_tokens)
    before = old_size if old_tokens is None else _number("old_tokens", old_tokens)
    unit = 1 if multiple is None else _number("pad_to_multiple_of", multiple)
    if before > old_size:
        raise ValueError(
            f"{WHAT}: old_tokens={before}, and the table has {old_size} rows; expected as many or "
            "fewer"
        )
    if count < before:
        hint = "" if old_tokens is not None else (
            "; if some of its rows are padding, say how many tokens there were: old_tokens=..."
        )  # fmt: skip
        raise ValueError(
            f"{WHAT}: n_tokens={count}, and there are {before} tokens already; vocabularies are "
            f"not shrunk{hint}"
        )
    size = -(-max(count, old_size) // unit) * unit
    return Vocabulary(count, size, before, old_size, axes)


def _number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise TypeError(f"{WHAT}: {name}={value!r}; expected an int above 0")
    return number


def _inits(
    init: Any, leaves: Mapping[str, Any], axes: Mapping[str, int], table: TieGroup
) -> dict[str, Any]:
    """Returns for each leaf that grows what its new rows are."""
    if isinstance(init, Mapping):
        odd = [p for p in init if p not in axes or is_marker(leaves[p])]
        if odd:
            raise ValueError(
                f"{WHAT}: init has {odd[0]!r}, which is no leaf that grows; these are "
                f"{', '.join(map(repr, axes))}"
            )
        inits = {p: init.get(p, "mean") for p in axes}
    elif callable(init):
        zeros = jax.nn.initializers.zeros
        inits = {p: zeros if _is_vector(leaves[p]) else init for p in axes}
    elif isinstance(init, str):
        inits = dict.fromkeys(axes, init)
    else:
        inits = {p: init if p == table.key else "mean" for p in axes}
    for path, how in inits.items():
        known = callable(how) or hasattr(how, "shape") or how == "mean"
        if not known:
            raise ValueError(
                f"{WHAT}: init={how!r} for {path!r}; expected 'mean', a function (key, shape, "
                "dtype), or an array with a row for each new token"
            )
    return inits


def _is_vector(leaf: Any) -> bool:
    return sum(n > 1 for n in getattr(leaf, "shape", ())) < 2


def _as_member(first: Any, member: Member, old: Any) -> Any:
    """Returns the group's array as a member has it, placed where the member was."""
    if not member.transposed:
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(first.shape[::-1], first.dtype, sharding=old.sharding)
    return in_place(old, first.T)
