"""What real PEFT does with tied encoder-decoder models, T5 and BART, pinned; and ours.

Four names mean the table: ``shared``, ``encoder.embed_tokens``, ``decoder.embed_tokens`` and
``lm_head``. In T5 the first three are one module, in BART they are four, of one Parameter. PEFT
adapts modules and not Parameters, hence what follows; a change here is news for the documentation.

- ``shared`` is never called: an adapter on it alone is not read by the model ("!"), and without a
  warning where the flag is False.
- In T5 the other names of that module cannot be targeted: PyTorch lists a module once.
- True ties ``lm_head`` with ``shared`` only. BART's encoder and decoder get LoRA of their own.
- True with `modules_to_save` makes each name a Linear: looking an id up in one fails.
- Trainable tokens are tied from ``shared`` only, and with any flag.

Ours adapts the Parameter: True and None give all that reads it one adapter, False one to each name.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers

import flax_tied_lora as tied_lora
from tests.against_torch.tying_tables import SAVE, SEQ2SEQ, TARGET, TOKENS, bart, run_peft, t5

pytestmark = pytest.mark.models
MISSING = "NoMatchingPeftModuleError"
BROKEN = "a a a a 768/768 called: RuntimeError"

# field, flag, names, what T5 and BART get by the order of SEQ2SEQ (see `Record.line`), warnings.
PEFT_DOES = [
    (TARGET, False, "shared", "a! . . . 128/128", "a! . . . 128/128", ""),
    (TARGET, False, "encoder.embed_tokens", MISSING, ". a . . 128/128", "not ensured"),
    (TARGET, False, "embed_tokens", MISSING, ". a b . 256/256", "not ensured"),
    (TARGET, False, "lm_head", ". . . a 128/128", ". . . a 128/128", "not ensured"),
    (TARGET, False, "shared+lm_head", "a! . . b 256/256", "a! . . b 256/256", "not ensured"),
    (SAVE, False, "shared", "a! . . . 768/768", "a! . . . 768/768", ""),
    (SAVE, False, "encoder.embed_tokens", ". a . . 768/768", ". a . . 768/768", "not ensured"),
    (SAVE, False, "embed_tokens", ". a b . 1536/1536", ". a b . 1536/1536", "not ensured"),
    (SAVE, False, "lm_head", ". . . a 768/768", ". . . a 768/768", "not ensured"),
    (SAVE, False, "shared+lm_head", "a! . . b 1536/1536", "a! . . b 1536/1536", "not ensured"),
    (TOKENS, False, "shared", "a a a a 32/32", "a a a a 32/32", ""),
    (TOKENS, False, "encoder.embed_tokens", ". a . . 32/32", ". a . . 32/32", ""),
    (TOKENS, False, "embed_tokens", ". a b . 64/64", ". a b . 64/64", ""),
    (TOKENS, False, "lm_head", ". . . a 32/32", ". . . a 32/32", ""),
    (TOKENS, False, "shared+lm_head", "a a a a 32/32", "a a a a 32/32", ""),
    (TARGET, True, "shared", "a! . . . 128/128", "a! . . . 128/128", "no target tied"),
    (TARGET, True, "encoder.embed_tokens", "a! . . a 256/128", "a! b c a 512/384", ""),
    (TARGET, True, "embed_tokens", "a! . . a 256/128", "a! b c a 512/384", ""),
    (TARGET, True, "lm_head", "a! . . a 256/128", "a! b c a 512/384", ""),
    (TARGET, True, "shared+lm_head", "a! . . a 256/128", "a! b c a 512/384", ""),
    (SAVE, True, "shared", "a! . . . 768/768", "a! . . . 768/768", "no target tied"),
    (SAVE, True, "encoder.embed_tokens", BROKEN, BROKEN, ""),
    (SAVE, True, "embed_tokens", BROKEN, BROKEN, ""),
    (SAVE, True, "lm_head", BROKEN, BROKEN, ""),
    (SAVE, True, "shared+lm_head", BROKEN, BROKEN, ""),
    (TOKENS, True, "shared", "a a a a 32/32", "a a a a 32/32", "no target tied"),
    (TOKENS, True, "encoder.embed_tokens", ". a . . 32/32", ". a . . 32/32", "no target tied"),
    (TOKENS, True, "embed_tokens", ". a b . 64/64", ". a b . 64/64", "no target tied"),
    (TOKENS, True, "lm_head", ". . . a 32/32", ". . . a 32/32", "no target tied"),
    (TOKENS, True, "shared+lm_head", "a a a a 32/32", "a a a a 32/32", "no target tied"),
]


@pytest.mark.parametrize(("field", "flag", "names", "in_t5", "in_bart", "warned"), PEFT_DOES)
def test_peft_does_this(field, flag, names, in_t5, in_bart, warned):
    value = {name: [1, 2] for name in names.split("+")} if field == TOKENS else names.split("+")
    for model, layer, expected in ((t5(True), "q", in_t5), (bart(True), "q_proj", in_bart)):
        fields = {TARGET: [layer], field: value, "ensure_weight_tying": flag, "r": 2}
        record = run_peft(model, **fields)
        assert record.line(*SEQ2SEQ) == expected
        assert ", ".join(record.warnings) == warned


def test_the_flag_is_false_where_it_is_not_given():
    assert peft.LoraConfig().ensure_weight_tying is False


@pytest.mark.parametrize("make", [t5, bart])
def test_nothing_is_tied_in_an_untied_model(make):
    layer = "q" if make is t5 else "q_proj"
    for field, value in ((TARGET, ["shared", "lm_head"]), (SAVE, ["shared", "lm_head"])):
        record = run_peft(
            make(False), **{TARGET: [layer], field: value, "ensure_weight_tying": True, "r": 2}
        )
        assert record.line(*SEQ2SEQ).startswith("a! . . b ")
        assert record.warnings == ("nothing tied",)


ENCODER, DECODER, OUTPUT = "encoder/shared", "decoder/shared", "lm_head"
FLAX = {
    "t5": ("FlaxT5ForConditionalGeneration", t5, "q"),
    "bart": ("FlaxBartForConditionalGeneration", bart, "q_proj"),
}
# What each name means where the flag is False.
MEANS = {
    "shared": {ENCODER, DECODER},
    "embed_tokens": {ENCODER, DECODER},
    "encoder/shared": {ENCODER},
    "lm_head": {OUTPUT},
}


@functools.cache
def flax_model(kind: str) -> tuple[Any, Any, Any]:
    """Returns a tied model's params, call sites and config."""
    name, make, _ = FLAX[kind]
    ids = np.array([[1, 2, 3]], np.int32)
    clip = jnp.clip
    with pytest.MonkeyPatch.context() as patch:
        # Flax T5 calls it by an argument's old name.
        patch.setattr(jnp, "clip", lambda x, *b, a_max=None: clip(x, *b, max=a_max))
        model = getattr(transformers, name)(make(True).config, seed=0)
        sites = tied_lora.trace(
            lambda p: model(ids, decoder_input_ids=ids, params=p, train=False).logits, model.params
        )
    return model.params, sites, model.config


def ours(kind: str, field: str, names: list[str], flag: bool | None) -> tuple[list[Any], int]:
    """Returns, for each adapter of the table, the call sites that it is for; and the warnings."""
    params, sites, ties = flax_model(kind)
    value = {name: [1, 2] for name in names} if field == TOKENS else names
    fields = {TARGET: [FLAX[kind][2]], field: value, "ensure_weight_tying": flag, "r": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = tied_lora.LoraConfig(**fields)
        plan = tied_lora.wrap(params, config, sites=sites, ties=ties).plan
    assert all(w.category is tied_lora.WeightTyingWarning for w in caught)
    (table,) = [group for group in plan.groups if "shared" in group.key]
    places = [
        {
            name
            for site in sites.of(table.key)
            if adapter.sites is None or adapter.sites(site.role, site.scope)
            for name in (ENCODER, DECODER, OUTPUT)
            if site.scope.endswith(name)
        }
        for adapter in table.adapters
    ]
    return places, len(caught)


@pytest.mark.parametrize("kind", FLAX)
@pytest.mark.parametrize("field", [TARGET, SAVE, TOKENS])
@pytest.mark.parametrize("names", [*([name] for name in MEANS), ["shared", "lm_head"]], ids=str)
def test_ours_gives_all_that_reads_the_table_one_adapter(kind, field, names):
    for flag in (True, None):
        assert ours(kind, field, names, flag) == ([{ENCODER, DECODER, OUTPUT}], 0)


@pytest.mark.parametrize("kind", FLAX)
@pytest.mark.parametrize("field", [TARGET, SAVE])
@pytest.mark.parametrize("names", [*([name] for name in MEANS), ["shared", "lm_head"]], ids=str)
def test_ours_gives_each_name_its_own_where_the_flag_is_false(kind, field, names):
    places, warned = ours(kind, field, names, False)
    assert sorted(map(sorted, places)) == sorted(sorted(MEANS[name]) for name in names)
    assert warned == 1


@pytest.mark.parametrize("kind", FLAX)
def test_ours_ties_tokens_of_the_embedding_with_any_flag(kind):
    every = [{ENCODER, DECODER, OUTPUT}]
    assert ours(kind, TOKENS, ["shared"], False) == (every, 0)
    assert ours(kind, TOKENS, ["shared", "lm_head"], False) == (every, 0)
    assert ours(kind, TOKENS, ["lm_head"], False) == ([{OUTPUT}], 0)
    assert ours(kind, TOKENS, ["encoder/shared"], False) == ([{ENCODER}], 0)
