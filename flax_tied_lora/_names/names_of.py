"""`names_of`: the table of names of a family, of a model with a config, or of lines given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._names import (
    bonsai_tables,
    easydel_tables,
    flax_examples_tables,
    gemma_tables,
    kerashub_tables,
    levanter_tables,
    maxtext_tables,
    skyrl_tables,
    t5x_tables,
    transformers_tables,
    tunix_tables,
)
from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import LineEntry, make_line
from flax_tied_lora._names.mapping import Names, Tie, UnmappedError
from flax_tied_lora._names.model_config import TIED, config_field, says_tied

_FAMILIES = {
    **transformers_tables.FAMILIES,
    **tunix_tables.FAMILIES,
    **gemma_tables.FAMILIES,
    **easydel_tables.FAMILIES,
    **skyrl_tables.FAMILIES,
    **bonsai_tables.FAMILIES,
    **levanter_tables.FAMILIES,
}
# Those that have other leaves in models with as many key heads as heads.
_FUSED = {**tunix_tables.FUSED, **gemma_tables.FUSED}
# Those whose table depends on the model's config, and on how many rows PyTorch's table has.
_CONFIGURED = {
    **maxtext_tables.FAMILIES,
    **kerashub_tables.FAMILIES,
    **t5x_tables.FAMILIES,
    **flax_examples_tables.FAMILIES,
}
FAMILIES: tuple[str, ...] = (*_FAMILIES, *_CONFIGURED)


# Before a config's ``model_type``: some that are transformers' by that have other leaves.
_OF_CONFIGS = (
    easydel_tables.easydel_family,
    skyrl_tables.skyrl_family,
    bonsai_tables.bonsai_family,
    levanter_tables.levanter_family,
    tunix_tables.tunix_family,
    gemma_tables.gemma_family,
    maxtext_tables.maxtext_family,
    kerashub_tables.kerashub_family,
    t5x_tables.t5x_family,
)


def names_of(
    model: Any,
    extra: Iterable[LineEntry] = (),
    *,
    tie_word_embeddings: bool | None = None,
    tied: Mapping[str, Sequence[str]] | None = None,
    vocab_size: int | None = None,
) -> Names:
    """Returns the correspondence of a model's Flax leaf paths and its PyTorch parameter names.

    Args:
      model: a family's name (``FAMILIES`` lists them), a transformers config, a dict with its
        ``model_type`` (a ``config.json``), a tunix ``ModelConfig``, a gemma ``TransformerConfig``,
        a config of MaxText, EasyDeL, SkyRL tx, bonsai or Levanter, a KerasHub backbone or task, a
        T5X ``T5Config``, or None for any other model, whose whole table is ``extra``.
      extra: further lines, which take precedence over the family's: see `flax_tied_lora.names`.
      tie_word_embeddings: whether input and output are tied; by default what the config says, or
        the family's own default.
      tied: ``{Flax path: PyTorch modules that share the leaf's tensor}``, beyond the ties of the
        family: ``{"embed/embedding": ("lm_head",)}``.
      vocab_size: rows of PyTorch's input embedding; by default the config's. MaxText's config says
        how many rows its own padded table has.

    Raises:
      ValueError: the family is not known, or a line of the table is wrong: the line, and why.

    >>> names = names_of("gpt2")
    >>> names.to_torch("transformer/h/3/attn/c_attn/kernel", 2)[0].name
    'transformer.h.3.attn.c_attn.weight'
    >>> names.to_flax("transformer.h.3.attn.c_attn.weight")[0]
    'transformer/h/3/attn/c_attn/kernel'
    >>> dict(names.tied)
    {'transformer/wte/embedding': ('lm_head',)}
    """
    lines = tuple(make_line(line) for line in extra)
    for i, line in enumerate(lines):
        if line.name in [other.name for other in lines[:i]]:
            raise ValueError(f"table of names: {line.name!r} is in two lines; keep one of them")
    name = _family_name(model)
    if name not in FAMILIES and not lines:
        raise ValueError(_unknown(name))
    if tie_word_embeddings is None and config_field(model, TIED) is not None:
        tie_word_embeddings = says_tied(model)
    if tie_word_embeddings is None:
        tie_word_embeddings = tunix_tables.tunix_ties(model)
    names = Names(name, ())
    if name in _CONFIGURED:
        names = _names(name, _CONFIGURED[name](model, vocab_size), tie_word_embeddings)
    elif name in _FAMILIES:
        names = _family_names(name, _is_fused(model), tie_word_embeddings)
    ties = {tie.path: tie for tie in names.ties}
    for path, modules in (tied or {}).items():
        known = ties[path].names if path in ties else ()
        ties[path] = Tie(path, tuple(dict.fromkeys((*known, *_modules(path, modules)))))
    size = config_field(model, "vocab_size") if vocab_size is None else vocab_size
    names = dataclasses.replace(
        names, extra=lines, ties=tuple(ties.values()),
        vocab_size=size if isinstance(size, int) else None,
    )  # fmt: skip
    for path in tied or {}:
        _check_tie(names, ties[path])
    return names


@functools.cache
def _family_names(name: str, fused: bool, tied: bool | None) -> Names:
    make = _FUSED.get(name, _FAMILIES[name]) if fused else _FAMILIES[name]
    return _names(name, make(), tied)


def _names(name: str, family: Family, tied: bool | None) -> Names:
    tied = family.tied if tied is None else tied
    # In Flax a tied head has no leaf: its PyTorch name is another name of the embedding.
    absent = family.head_leaf if tied and not family.keeps_head_leaf else None
    return Names(
        name,
        tuple(line for line in family.lines if line.path != absent),
        ties=_ties(family, tied),
        prefix=family.prefix,
        ignored=family.ignored,
        renamed=family.renamed,
        hints=family.hints,
    )


def _ties(family: Family, tied: bool) -> tuple[Tie, ...]:
    heads = tuple(f"{m}.weight" for m in (family.heads if tied else ()))
    ties = [Tie(family.table, (*(f"{m}.weight" for m in family.shared), *heads))]
    ties += [Tie(table, heads) for table in family.other_tables]
    if family.prefix:  # the model without a head
        bare = (m.removeprefix(f"{family.prefix}.") for m in family.shared)
        table = family.table.removeprefix(f"{family.prefix}/")
        ties.append(Tie(table, tuple(f"{m}.weight" for m in bare)))
    ties += [Tie(path, names) for path, names in family.same]
    return tuple(tie for tie in ties if tie.names)


def _family_name(model: Any) -> str:
    if model is None:
        return "own"
    name = model if isinstance(model, str) else None
    for known in _OF_CONFIGS:
        name = name or known(model)
    name = name or config_field(model, "model_type")
    if not isinstance(name, str):
        raise ValueError(
            f"names_of takes a family's name, a model's config, a dict with its model_type, or "
            f"None and a table; found {type(model).__name__} without a model_type"
        )
    return name


def _is_fused(model: Any) -> bool:
    heads = config_field(model, "num_attention_heads") or config_field(model, "num_heads")
    keys = config_field(model, "num_key_value_heads") or config_field(model, "num_kv_heads")
    return heads is not None and heads == keys


def _modules(path: str, modules: Any) -> tuple[str, ...]:
    if isinstance(modules, str) or not all(isinstance(m, str) for m in modules):
        raise ValueError(
            f"tied={{{path!r}: {modules!r}}}: expected PyTorch module names, as in "
            f"{{{path!r}: ('lm_head',)}}"
        )
    return tuple(f"{m}.weight" for m in modules)


def _check_tie(names: Names, tie: Tie) -> None:
    try:
        weight = names.own_weight(tie)
    except UnmappedError as error:
        raise ValueError(f"tied: {error}") from None
    if weight.name in tie.names:
        raise ValueError(f"tied: {weight.name} is {tie.path!r} itself: leave it out")


def _unknown(name: str) -> str:
    of_tunix = [known for known in FAMILIES if known.startswith(f"tunix/{name}")]
    if of_tunix:
        hint = f"transformers has no Flax class for it; for tunix's say {of_tunix[0]!r}"
    else:
        hint = f"known are {', '.join(FAMILIES)}"
    return (
        f"there is no table of names for the family {name!r}: {hint}. For a model of your own give "
        'a table: names_of(None, extra=[("layers_{}/up/kernel", "layers.{}.up.weight"), ...])'
    )
