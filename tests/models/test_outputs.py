"""The oracle on real models: logits and gradients, adapted beside merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import transformers

import flax_tied_lora as tied_lora
from tests.models.checks import (
    adapted_of,
    compiled,
    each_family,
    far,
    model_tests,
    sites_of,
    some_by_default,
    wrapped,
)
from tests.models.families import FAMILIES, TOKENS, build
from tests.models.families import clip_of_old_jax as clip_of_old_jax

pytestmark = model_tests


def outcomes(name: str, dtype: Any, adapted: Any) -> tuple[Any, Any, Any]:
    """Returns loss, logits and gradients: adapted, merged, and without an adapter."""
    case = build(name, dtype)
    apply = tied_lora.adapt(case.call, on_dense="error")

    def cross_entropy(logits: Any) -> Any:
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, case.labels).mean(), logits

    def loss(adapted: Any) -> Any:
        return cross_entropy(apply(adapted, case.tokens))

    def merged_loss(adapters: Any, adapted: Any) -> Any:
        merged = tied_lora.merge(adapted.replace(adapters=adapters))
        return cross_entropy(case.call(merged, case.tokens))

    reference = compiled(jax.value_and_grad(merged_loss, has_aux=True))
    ours = compiled(tied_lora.value_and_grad(loss, has_aux=True))(adapted)
    none = jax.tree.map(jnp.zeros_like, adapted.adapters)
    return ours, reference(adapted.adapters, adapted), reference(none, adapted)


@each_family
def test_logits_and_gradients_are_those_of_the_merged_model(name):
    ours, merged, unadapted = outcomes(name, jnp.float32, adapted_of(name))
    worst = jax.tree.map(far, ours, merged)
    assert max(jax.tree.leaves(worst)) < 1e-5, worst
    # And there was something to get wrong.
    assert far(unadapted[0][1], merged[0][1]) > 1e-2
    if FAMILIES[name].checkpoint:
        case = build(name)
        apply = tied_lora.adapt(case.call, on_dense="error")
        program = jax.make_jaxpr(lambda adapted: apply(adapted, case.tokens))(adapted_of(name))
        assert any(e.primitive.name in ("checkpoint", "remat2") for e in program.eqns)


# Rounding is the operations' own affair: a few families show it, the slow tests all.
@some_by_default(FAMILIES, ["opt_projected", "albert"])
def test_bfloat16_is_near_to_the_merged_model(name):
    """Logits within 2e-2; gradients, by float32, about as near as the merged model's own.

    In these gradients bfloat16's rounding alone is 3 to 30 %, merged or not.
    """
    case = build(name, jnp.bfloat16)
    half = wrapped(case, case.model.to_bf16(case.params), sites_of(name))
    assert {x.dtype for x in jax.tree.leaves(half.adapters)} == {jnp.dtype("float32")}
    wide = half.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), half.params))
    ((_, logits), ours), ((_, expected), merged), _ = outcomes(name, jnp.bfloat16, half)
    assert 0 < far(logits, expected) < 2e-2
    (_, exact), _, _ = outcomes(name, jnp.float32, wide)
    for mine, other in zip(
        *(jax.tree.leaves(jax.tree.map(far, g, exact)) for g in (ours, merged)), strict=True
    ):
        assert mine <= 2 * other + 2e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_is_as_near_to_float32_as_the_merged_model(name):
    """The adapted error is at most twice the merged one's, both judged by float32."""
    wide, narrow = build(name), build(name, jnp.bfloat16)
    half = wrapped(narrow, narrow.model.to_bf16(narrow.params), sites_of(name))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), tied_lora.base(half))
    exact = wrapped(wide, exact, sites_of(name))
    reference = compiled(wide.call)(tied_lora.merge(exact), TOKENS)

    merged = tied_lora.merge(half)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    expected = compiled(narrow.call)(merged, TOKENS)
    logits = compiled(tied_lora.adapt(narrow.call, on_dense="error"))(half, TOKENS)
    assert logits.dtype == expected.dtype == jnp.bfloat16
    assert 0 < far(logits, reference) <= 2 * far(expected, reference)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_flax_module_itself_is_served_the_same(name):
    """Not by way of the model object: ``module.apply`` on variables that hold the adapted."""
    case, adapted = build(name), adapted_of(name)
    mask = jnp.ones_like(TOKENS)
    inputs: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": mask}
    if case.family.encodes:
        inputs |= {"decoder_input_ids": TOKENS[:, ::-1], "decoder_attention_mask": mask}
    else:
        inputs["position_ids"] = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def logits(variables: Any) -> Any:
        return case.model.module.apply(variables, **inputs).logits

    found = compiled(tied_lora.adapt(logits, on_dense="error"))({"params": adapted})
    assert far(found, compiled(logits)({"params": tied_lora.merge(adapted)})) < 1e-5


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


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_adapted_params_of_a_model_that_was_not_adapted_are_an_error(name):
    hint = r'tied_lora\.adapt\(model\.apply\)\(\{"params": adapted\}, .* AdaptedModel\(model, ad'
    with pytest.raises(TypeError, match=hint):
        build(name).call(adapted_of(name), TOKENS)
    if name != "bert":
        with pytest.raises(TypeError, match=hint):
            build(name).model.generate(TOKENS, params=adapted_of(name), max_new_tokens=2)


def test_the_models_own_dropout_is_as_in_the_merged_model():
    case, adapted = build("gpt2"), adapted_of("gpt2")

    def training(params: Any, key: Any) -> Any:
        return case.model(TOKENS, params=params, train=True, dropout_rng=key).logits

    key, other = jax.random.split(jax.random.PRNGKey(5))
    run, merged = compiled(tied_lora.adapt(training, on_dense="error")), compiled(training)
    logits = run(adapted, key)
    assert far(logits, merged(tied_lora.merge(adapted), key)) < 1e-5
    assert far(logits, run(adapted, other)) > 1e-2
