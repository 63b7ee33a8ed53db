"""The 28 rows of PEFT's tables on weight tying: its documentation, real PEFT, and ours."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import flax_tied_lora as tied_lora
from tests.against_torch.tying_tables import (
    DOCUMENTED,
    EMBED,
    HEAD,
    RANK,
    ROWS,
    SAVE,
    TARGET,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Record,
    Row,
    llama,
    llama_config,
    run_peft,
)

pytestmark = pytest.mark.models
KIND = {SAVE: SAVE, TARGET: "lora", TOKENS: "trainable_tokens"}
IDS = np.array([[1, 2, 3], [4, 5, 1]], np.int32)

# What PEFT 0.21.2 does with each row: what embed_tokens and lm_head get (see `Record.line`), and
# what it warns of. Two numbers that differ: PEFT counts the factors of a tied adapter twice, as
# embed_tokens and lm_head hold them as different Parameters of the same memory.
PEFT_DOES = {
    "save untied False embed_tokens": ("a . 768/768", ""),
    "save untied False lm_head": (". a 768/768", ""),
    "save untied True embed_tokens": ("a . 768/768", "nothing tied"),
    "save untied True lm_head": (". a 768/768", "nothing tied"),
    "save tied False embed_tokens": ("a . 768/768", "not ensured"),
    "save tied False lm_head": (". a 768/768", "not ensured"),
    "save tied True embed_tokens": ("a a 768/768", ""),
    "save tied True lm_head": ("a a 768/768", ""),
    "save untied False embed_tokens+lm_head": ("a b 1536/1536", ""),
    "save untied True embed_tokens+lm_head": ("a b 1536/1536", "nothing tied"),
    "save tied False embed_tokens+lm_head": ("a b 1536/1536", "not ensured"),
    "save tied True embed_tokens+lm_head": ("a a 768/768", ""),
    "target untied False embed_tokens": ("a . 128/128", ""),
    "target untied False lm_head": (". a 128/128", ""),
    "target untied True embed_tokens": ("a . 128/128", "nothing tied"),
    "target untied True lm_head": (". a 128/128", "nothing tied"),
    "target tied False embed_tokens": ("a . 128/128", "not ensured"),
    "target tied False lm_head": (". a 128/128", "not ensured"),
    "target tied True embed_tokens": ("a a 256/128", ""),
    "target tied True lm_head": ("a a 256/128", ""),
    "target untied False embed_tokens+lm_head": ("a b 256/256", ""),
    "target untied True embed_tokens+lm_head": ("a b 256/256", "nothing tied"),
    "target tied False embed_tokens+lm_head": ("a b 256/256", "not ensured"),
    "target tied True embed_tokens+lm_head": ("a a 256/128", ""),
    "tokens untied False 1+2+3": ("a . 48/48", ""),
    "tokens untied True 1+2+3": ("a . 48/48", "nothing tied, tokens not tied"),
    "tokens tied False 1+2+3": ("a a 48/48", ""),
    "tokens tied True 1+2+3": ("a a 48/48", "no target tied"),
    "tokens untied False lm_head=1+2 embed_tokens=1+2": ("a b 64/64", ""),
    "tokens untied True lm_head=1+2 embed_tokens=1+2": (
        "a b 64/64",
        "nothing tied, tokens not tied",
    ),
    "tokens tied False lm_head=1+2 embed_tokens=1+2": ("a a 32/32", ""),
    "tokens tied True lm_head=1+2 embed_tokens=1+2": (
        "a a 32/32",
        "no target tied",
    ),
    "tokens untied False lm_head=1+2 embed_tokens=3+4": ("a b 64/64", ""),
    "tokens untied True lm_head=1+2 embed_tokens=3+4": (
        "a b 64/64",
        "nothing tied, tokens not tied",
    ),
    "tokens tied False lm_head=1+2 embed_tokens=3+4": ("a b 64/64", ""),
    "tokens tied True lm_head=1+2 embed_tokens=3+4": (
        "ValueError",
        "no target tied",
    ),
}

# Where PEFT's code contradicts its documentation: it warns.
CONTRADICTIONS = {
    "save tied False embed_tokens": "as it does where both are named",
    "save tied False lm_head": "as it does where both are named",
    "target tied False embed_tokens": "as it does where both are named",
    "target tied False lm_head": "as it does where both are named",
    "tokens tied True 1+2+3": "that no tied module is added, though one is: the tokens are tied",
    "tokens tied True lm_head=1+2 embed_tokens=1+2": "the same, as untrue",
}
# Where ours is what the documentation says, as what the code does is plainly a mistake.
OURS_AS_DOCUMENTED = {name for name in CONTRADICTIONS if name.startswith("tokens")}


# Not in the tables: tokens of one name only.
MORE = [
    Row(TOKENS, True, False, {HEAD: [1, 2]}),
    Row(TOKENS, True, False, {EMBED: [1, 2]}),
    Row(TOKENS, False, False, {HEAD: [1, 2]}),
]


@functools.cache
def record_of(name: str) -> Record:
    row = next(row for row in [*ROWS, *MORE] if str(row) == name)
    return run_peft(llama(row.tied), **row.fields)


def expected(record: Record) -> dict[str, Any]:
    """Returns what PEFT did in our words: `trainable` counts a shared adapter once."""
    if record.error:
        return ERROR
    kinds = {name.removeprefix("model."): kind for name, kind in record.kinds.items()}
    return {
        "lookup": kinds.get(EMBED),
        "projection": kinds.get(HEAD),
        "shared": len(record.storages) > len(set(record.storages.values())),
        "trainable": record.stored,
        "warns": bool(record.warnings),
        "error": False,
    }


ERROR = {
    "lookup": None, "projection": None, "shared": False, "trainable": 0, "warns": False,
    "error": True,
}  # fmt: skip


def documented(row: Row) -> dict[str, Any]:
    """Returns what the documentation says of a row, in the same words."""
    if row.says == "Error":
        return ERROR
    shared = "tied" in row.says.lower() and "separate" not in row.says
    names = (EMBED, HEAD) if shared else row.names
    sizes = {
        SAVE: VOCABULARY * WIDTH,
        TARGET: RANK * (VOCABULARY + WIDTH),
        TOKENS: WIDTH * len(next(iter(row.value.values()), ()) if isinstance(row.value, dict)
                            else row.value),
    }  # fmt: skip
    return {
        "lookup": KIND[row.field] if EMBED in names else None,
        "projection": KIND[row.field] if HEAD in names else None,
        "shared": shared,
        "trainable": sizes[row.field] * (1 if shared else len(names)),
        "warns": row.says.startswith("Warn"),
        "error": False,
    }


def test_the_tables_have_28_rows():
    assert len(DOCUMENTED) == 28
    assert list(PEFT_DOES) == [str(row) for row in ROWS]


@pytest.mark.parametrize("name", PEFT_DOES)
def test_peft_does_this(name):
    record = record_of(name)
    assert (record.line(EMBED, HEAD), ", ".join(record.warnings)) == PEFT_DOES[name]
    assert not record.unused


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peft_contradicts_its_documentation_in_these_rows_only(row):
    says, does = documented(row), expected(record_of(str(row)))
    if str(row) in CONTRADICTIONS:
        assert {**says, "warns": True} == does != says
    else:
        assert says == does


class OneLeaf(nn.Module):
    """A language model whose table is one leaf: looked up, and projected with by `attend`."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCABULARY, WIDTH, name=EMBED)
        x = embed(tokens)
        return embed.attend(x + jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="q_proj")(x)))


@functools.cache
def one_leaf() -> tuple[Any, Any, Any]:
    """Returns params, call sites, and what says that the model is tied."""
    params = OneLeaf().init(jax.random.key(0), IDS)["params"]
    sites = tied_lora.trace(lambda p: OneLeaf().apply({"params": p}, IDS), params)
    return params, sites, {"tie_word_embeddings": True, "vocab_size": VOCABULARY}


@functools.cache
def two_leaves(tied: bool) -> tuple[Any, Any, Any]:
    """Returns the same of transformers' Llama, which has a leaf of its own for the head."""
    config = llama_config(tied)
    model = transformers.FlaxLlamaForCausalLM(config, seed=0)
    params = model.params
    if tied:
        table = params["model"][EMBED]["embedding"]
        params = {**params, HEAD: {"kernel": table.T}}
    sites = tied_lora.trace(lambda p: model(IDS, params=p, train=False).logits, params)
    return params, sites, config


def ours(row: Row, params: Any, sites: Any, ties: Any) -> dict[str, Any]:
    """Returns what `wrap` does with a row."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = tied_lora.LoraConfig(**row.fields)
            adapted = tied_lora.wrap(params, config, sites=sites, ties=ties)
        except ValueError:
            return ERROR
    assert all(w.category is tied_lora.WeightTyingWarning for w in caught)
    assert len(caught) <= 1, "a model is warned of once"
    assert all(EMBED in str(w.message) or HEAD in str(w.message) for w in caught)
    covering: dict[str, list[Any]] = {"lookup": [], "projection": []}
    for group, adapter in adapted.plan.adapters():
        for site in sites.of(*(member.path for member in group.members)):
            where = adapter.sites is None or adapter.sites(site.role, site.scope)
            if EMBED not in group.key and HEAD not in group.key:
                assert (adapter.kind, row.field != TARGET) == ("lora", True)
            elif adapter.covers(site.leaf) and where:
                covering[site.role].append(adapter)
    assert all(len(set(found)) <= 1 for found in covering.values()), covering
    lookup, projection = (next(iter(found), None) for found in covering.values())
    return {
        "lookup": lookup and lookup.kind,
        "projection": projection and projection.kind,
        "shared": lookup is not None and lookup == projection,
        "trainable": sum(
            math.prod(leaf.shape)
            for adapter in {lookup, projection} - {None}
            for leaf in jax.tree.leaves(adapted.adapters[adapter.kind][adapter.key])
        ),
        "warns": bool(caught),
        "error": False,
    }


def wanted(row: Row) -> dict[str, Any]:
    return documented(row) if str(row) in OURS_AS_DOCUMENTED else expected(record_of(str(row)))


@pytest.mark.parametrize("row", [*ROWS, *MORE], ids=str)
def test_ours_does_the_same_where_the_head_is_a_leaf(row):
    assert ours(row, *two_leaves(row.tied)) == wanted(row)


@pytest.mark.parametrize("row", [row for row in [*ROWS, *MORE] if row.tied], ids=str)
def test_ours_does_the_same_where_the_table_is_the_only_leaf(row):
    assert ours(row, *one_leaf()) == wanted(row)


@pytest.mark.parametrize("model", [one_leaf, lambda: two_leaves(True)], ids=["one", "two"])
@pytest.mark.parametrize("row", [r for r in ROWS if r.tied and r.flag], ids=str)
def test_none_ties_what_is_tied_and_says_nothing(row, model):
    assert ours(dataclasses.replace(row, flag=None), *model()) == documented(row)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.tied and not r.flag], ids=str)
def test_none_leaves_apart_what_is_not_tied(row):
    assert ours(dataclasses.replace(row, flag=None), *two_leaves(False)) == documented(row)


@pytest.mark.parametrize("model", [one_leaf, lambda: two_leaves(True)], ids=["one", "two"])
def test_true_ties_tokens_of_the_head_alone_too(model):
    """PEFT ties from the input embedding only, and leaves the two apart under True."""
    row = Row(TOKENS, True, True, {HEAD: [1, 2]}, "tied")
    peft_does = run_peft(llama(True), **row.fields)
    assert peft_does.line(EMBED, HEAD) == ". a 32/32"
    assert ours(row, *model()) == documented(row)


@pytest.mark.parametrize("model", [one_leaf, lambda: two_leaves(True)], ids=["one", "two"])
def test_order_of_tokens_makes_no_difference(model):
    """PEFT compares lists: the same tokens in another order are an error under True."""
    row = Row(TOKENS, True, True, {HEAD: [1, 2], EMBED: [2, 1]}, "tied")
    assert run_peft(llama(True), **row.fields).error == "ValueError"
    assert ours(row, *model()) == documented(row)
