"""Decoding with real models: their own ``generate``, with its cache, greedy and by beams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.models.checks import adapted_of, compiled, far, model_tests, some_by_default
from tests.models.families import FAMILIES, build
from tests.models.families import clip_of_old_jax as clip_of_old_jax

pytestmark = model_tests


@some_by_default([name for name, f in FAMILIES.items() if f.generates])
def test_generates_what_the_merged_model_generates(name):
    """A key-value cache, filled in a while loop that holds the adapted weights."""
    case, adapted = build(name), adapted_of(name)

    def generate(params: Any, tokens: Any) -> Any:
        # One token first: what a longer prompt adds is in the beams' first step.
        return case.generate(params, tokens[:, :1]), case.generate(params, tokens, num_beams=2)

    found = compiled(tied_lora.adapt(generate, on_dense="error"))(adapted, case.tokens)
    merged = compiled(generate)
    expected = merged(tied_lora.merge(adapted), case.tokens)
    unadapted = merged(tied_lora.base(adapted), case.tokens)
    for ours, theirs, others in zip(found, expected, unadapted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert not np.array_equal(ours, others)


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_an_adapted_model_keeps_generate_and_the_rest(name):
    """Whisper's ``generate`` does not name ``params``: it hands them on."""
    case, adapted = build(name), adapted_of(name)
    model = tied_lora.AdaptedModel(case.model, adapted, on_dense="error")
    assert model.config is case.model.config
    assert model.can_generate()
    found = type(case)(case.family, model, adapted)
    for _ in range(2):
        ours = found.generate(None, case.tokens)
    np.testing.assert_array_equal(ours, case.generate(tied_lora.merge(adapted), case.tokens))
    assert not np.array_equal(ours, case.generate(case.params, case.tokens))
    logits = found.call(None, case.tokens)
    assert far(logits, case.call(tied_lora.merge(adapted), case.tokens)) < 1e-5
    with pytest.raises(TypeError, match="params is a dict; expected the Adapted"):
        found.generate(case.params, case.tokens)


@pytest.mark.parametrize("name", ["electra_causal", "big_bird_causal"])
def test_classes_that_cannot_generate(name):
    """They leave out arguments of their own module; docs/models.md says so."""
    assert not FAMILIES[name].generates
    case = build(name)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'astype'"):
        case.generate(case.params, case.tokens)
