"""The oracle on real models: transformers' Flax classes, adapted beside merged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import traverse_util

import flax_tied_lora as tied_lora
from flax_tied_lora import TiedLeaf
from tests.models.families import FAMILIES, LABELS, TOKENS, WIDTH, Case, build
from tests.models.families import clip_of_old_jax as clip_of_old_jax

pytestmark = pytest.mark.models
RANK = 3
# Quickly rather than well: each program runs once or twice.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def sites_of(name: str) -> tied_lora.CallSites:
    case = build(name)
    return tied_lora.trace(case.call, case.params, TOKENS)


@functools.cache
def adapted_of(name: str) -> tied_lora.Adapted:
    """The table and the attention projections, with a delta that is not zero."""
    case = build(name)
    return wrapped(case, case.params, sites_of(name))


def wrapped(case: Case, params: Any, sites: Any) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(r=RANK, lora_alpha=6, target_modules=case.family.targets)
    adapted = tied_lora.wrap(params, config, sites=sites, ties=case.family.ties)
    rng = np.random.default_rng(3)
    return adapted.replace(
        adapters=jax.tree.map(
            lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), adapted.adapters
        )
    )


def far(found: Any, expected: Any) -> float:
    """Returns the distance of two arrays, relative to the second one's norm."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cross_entropy(logits: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_trace_gives_the_sites_of_the_table(name):
    family = FAMILIES[name]
    sites = sites_of(name).of(family.table, *filter(None, [family.untied_head]))
    assert [s.role for s in sites] == ["lookup"] * family.lookups + ["projection"]
    assert [s.operation for s in sites] == ["gather"] * family.lookups + ["dot_general"]
    assert all((s.rows, s.cols) == ((0,), (1,)) for s in sites[:-1])
    # A projection by the table sums over its width; the separate kernel is the table, transposed.
    rows, cols = ((0,), (1,)) if family.untied_head else ((1,), (0,))
    assert (sites[-1].rows, sites[-1].cols) == (rows, cols)
    assert sites[-1].scope.partition("/")[2] == family.head
    if family.encodes:
        assert [s.scope.split("/")[-2] for s in sites[:2]] == ["encoder", "decoder"]


@each_family
def test_trace_meets_every_leaf(name):
    leaves = set(traverse_util.flatten_dict(build(name).params, sep="/"))
    assert set(sites_of(name).leaves()) == leaves


@each_family
def test_find_ties_names_the_table(name):
    case = build(name)
    found = tied_lora.find_ties(case.params, case.family.ties, sites=sites_of(name))
    group = next(g for g in found if g.key == case.family.table)
    if case.family.untied_head:
        assert group.paths == (case.family.table, case.family.untied_head)
        assert [m.transposed for m in group.members] == [False, True]
        assert "declared" in group.found
    else:
        assert group.paths == (case.family.table,)
        assert group.found == ("data flow",)


@each_family
def test_the_models_config_says_the_same(name):
    case = build(name)
    assert case.model.config.tie_word_embeddings is True
    by_config = tied_lora.find_ties(case.params, case.model.config, sites=sites_of(name))
    declared = tied_lora.find_ties(case.params, case.family.ties, sites=sites_of(name))
    assert [g.members for g in by_config] == [g.members for g in declared]
    as_dict = tied_lora.find_ties(case.params, case.model.config.to_dict(), sites=sites_of(name))
    assert as_dict == by_config


@each_family
def test_explain_shows_every_site_as_low_rank(name):
    case, adapted = build(name), adapted_of(name)
    family = case.family
    explanation = tied_lora.explain(case.call, adapted, TOKENS)
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} == {"low rank"}
    roles = [r.site.role for r in explanation.of(family.table)]
    assert roles == ["lookup"] * family.lookups + ["projection"]
    assert {r.groups for r in explanation.of(family.table)} == {(family.table,)}
    others = [g.key for g in adapted.plan.adapted if g.key != family.table]
    assert len(others) == family.kernels
    for key in others:
        reads = explanation.of(key)
        assert [r.site.role for r in reads] == ["projection"] * family.reads, key
        assert {r.groups for r in reads} == {(key,)}
    assert len(explanation.reads) == family.lookups + 1 + family.kernels * family.reads
    assert f"{len(explanation.reads)} call sites, 0 densified" in str(explanation)


@each_family
def test_logits_and_gradients_are_those_of_the_merged_model(name):
    case, adapted = build(name), adapted_of(name)
    apply = tied_lora.adapt(case.apply, on_dense="error")

    def loss(adapted: Any, tokens: Any) -> Any:
        logits = apply({"params": adapted}, tokens)
        return cross_entropy(logits), logits

    def merged_loss(adapters: Any, adapted: Any, tokens: Any) -> Any:
        merged = tied_lora.merge(adapted.replace(adapters=adapters))
        logits = case.apply({"params": merged}, tokens)
        return cross_entropy(logits), logits

    (value, logits), grads = compiled(tied_lora.value_and_grad(loss, has_aux=True))(adapted, TOKENS)
    reference = compiled(jax.value_and_grad(merged_loss, has_aux=True))
    (expected_value, expected), expected_grads = reference(adapted.adapters, adapted, TOKENS)

    assert far(logits, expected) < 1e-5
    assert far(value, expected_value) < 1e-5
    worst = jax.tree.map(far, grads, expected_grads)
    assert max(jax.tree.leaves(worst)) < 1e-5, worst
    # As people call it: the model object, masks and positions made inside, ``params=``.
    called = compiled(tied_lora.adapt(case.call, on_dense="error"))(adapted, TOKENS)
    assert far(called, expected) < 1e-5
    # And there was something to get wrong.
    none = jax.tree.map(jnp.zeros_like, adapted.adapters)
    (_, unadapted), _ = reference(none, adapted, TOKENS)
    assert far(unadapted, expected) > 1e-2


@each_family
def test_all_linear_is_every_kernel_but_the_output_projection(name):
    case = build(name)
    config = tied_lora.LoraConfig(r=2, target_modules="all-linear")
    adapted = tied_lora.wrap(case.params, config, sites=sites_of(name), ties=case.family.ties)
    leaves = traverse_util.flatten_dict(case.params, sep="/")
    kernels = {p for p in leaves if p.endswith("/kernel")} - {case.family.untied_head}
    assert {g.key for g in adapted.plan.adapted} == kernels


@each_family
def test_head_resolves_to_the_table(name):
    """A head has no leaf of its own where it is tied: it is known by its scope."""
    case = build(name)
    config = tied_lora.LoraConfig(r=2, target_modules=[case.family.head])
    adapted = tied_lora.wrap(case.params, config, sites=sites_of(name), ties=case.family.ties)
    (group,) = adapted.plan.adapted
    assert (group.key, group.is_table) == (case.family.table, True)
    assert group.shapes(group.adapters[0])["lora_a"] == (*group.shape[:1], 2)


@each_family
def test_lm_head_and_embed_tokens_are_roles_of_the_table(name):
    case = build(name)
    for target in ("lm_head", "embed_tokens"):
        config = tied_lora.LoraConfig(r=2, target_modules=[target])
        adapted = tied_lora.wrap(case.params, config, sites=sites_of(name), ties=case.family.ties)
        assert [(g.key, a.targets) for g, a in adapted.plan.adapters()] == [
            (case.family.table, (target,))
        ]


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if f.untied_head])
def test_lost_tie_is_repaired_without_a_second_copy(name):
    case, adapted = build(name), adapted_of(name)
    table = case.params["model"]["embed_tokens"]["embedding"]
    assert far(case.params["lm_head"]["kernel"], table.T) > 1  # what the loader left: random
    stored = adapted.params
    assert stored["lm_head"]["kernel"] == TiedLeaf(case.family.table, transposed=True)
    assert stored["model"]["embed_tokens"]["embedding"] is table
    assert sum(x.shape in (table.shape, table.shape[::-1]) for x in jax.tree.leaves(stored)) == 1

    base, merged = tied_lora.base(adapted), tied_lora.merge(adapted)
    for params in (base, merged):
        head, embedding = params["lm_head"]["kernel"], params["model"]["embed_tokens"]["embedding"]
        np.testing.assert_array_equal(head, embedding.T)
    factors = adapted.adapters["lora"][case.family.table]
    delta = 2.0 * np.asarray(factors["lora_a"], np.float64) @ np.asarray(factors["lora_b"])
    embedding = np.asarray(merged["model"]["embed_tokens"]["embedding"], np.float64)
    assert far(embedding - np.asarray(table, np.float64), delta) < 1e-5


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if f.untied_head])
def test_config_that_denies_the_tie_leaves_two_leaves(name):
    case = build(name)
    untied = {"tie_word_embeddings": False, "vocab_size": case.model.config.vocab_size}
    assert tied_lora.find_ties(case.params, untied, sites=sites_of(name)) == []
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    adapted = tied_lora.wrap(case.params, config, sites=sites_of(name), ties=untied)
    assert {g.key: g.shapes(a)["lora_a"][0] for g, a in adapted.plan.adapters()} == {
        "model/embed_tokens/embedding": 96,
        "lm_head/kernel": WIDTH,
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_is_as_near_to_float32_as_the_merged_model(name):
    """The adapted error is at most twice the merged one's, both judged by float32."""
    wide, narrow = build(name), build(name, jnp.bfloat16)
    half = wrapped(narrow, narrow.model.to_bf16(narrow.params), sites_of(name))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), tied_lora.base(half))
    exact = wrapped(wide, exact, sites_of(name))
    assert {x.dtype for x in jax.tree.leaves(half.adapters)} == {jnp.dtype("float32")}
    reference = compiled(wide.call)(tied_lora.merge(exact), TOKENS)

    merged = tied_lora.merge(half)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    expected = compiled(narrow.call)(merged, TOKENS)
    logits = compiled(tied_lora.adapt(narrow.call, on_dense="error"))(half, TOKENS)
    assert logits.dtype == expected.dtype == jnp.bfloat16
    assert 0 < far(logits, reference) <= 2 * far(expected, reference)


def test_model_called_without_params_is_an_error():
    """Such a model runs its own params: an adapted one would not be used at all."""
    name, fields = FAMILIES["gpt2"].config
    own = transformers.FlaxGPT2LMHeadModel(getattr(transformers, name)(**fields))
    adapted = adapted_of("gpt2")
    with pytest.raises(ValueError, match=r"no Adapted among the arguments .* params=adapted"):
        tied_lora.adapt(own)(TOKENS)
    with pytest.raises(ValueError, match=r"no Adapted among the arguments .* params=adapted"):
        tied_lora.explain(own, TOKENS, train=False)
    explanation = tied_lora.explain(own, TOKENS, params=adapted)
    explanation.assert_tied()
    assert len(explanation.reads) == 6


def test_the_models_own_dropout_is_as_in_the_merged_model():
    case, adapted = build("gpt2"), adapted_of("gpt2")

    def training(params: Any, key: Any) -> Any:
        return case.model(TOKENS, params=params, train=True, dropout_rng=key).logits

    key, other = jax.random.split(jax.random.PRNGKey(5))
    run, merged = compiled(tied_lora.adapt(training, on_dense="error")), compiled(training)
    logits = run(adapted, key)
    assert far(logits, merged(tied_lora.merge(adapted), key)) < 1e-5
    assert far(logits, run(adapted, other)) > 1e-2


def test_generates_what_the_merged_model_generates():
    """A key-value cache, filled in a while loop: the model's own ``generate``."""
    case, adapted = build("gpt2"), adapted_of("gpt2")

    def generate(params: Any, tokens: Any) -> Any:
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return case.model.generate(tokens, params=params, **settings).sequences

    found = compiled(tied_lora.adapt(generate, on_dense="error"))(adapted, TOKENS)
    merged = compiled(generate)
    np.testing.assert_array_equal(found, merged(tied_lora.merge(adapted), TOKENS))
    assert not np.array_equal(found, merged(tied_lora.base(adapted), TOKENS))
