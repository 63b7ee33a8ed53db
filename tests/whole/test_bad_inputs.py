"""Bad inputs beyond the config's own: each with its error, which names, says and advises.

Every case also checks that nothing was changed: params, adapters, sites and config are the same
objects with the same values afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import CallSites, Member, Plan, TieGroup
from tests.helpers.bad_inputs import (
    EMBED,
    HEAD,
    UP,
    Box,
    Hidden,
    Inputs,
    broken_variables,
    lora,
    site,
    twice,
)

LINE = "sites = tied_lora.trace(model.apply"
X = jnp.ones((3, 8))
Case = tuple[str, Callable[[Inputs], Any], type[Exception], list[str]]

TIES: list[Case] = [
    ("ties is another word", lambda i: tied_lora.find_ties(i.params, "always"), TypeError,
     ["ties='always'", "expected 'auto', a list, or a model's config"]),
    ("ties is a number", lambda i: tied_lora.find_ties(i.params, 3), TypeError,
     ["ties is a int", "expected 'auto', a list of path pairs"]),
    ("pair of one", lambda i: i.find((EMBED,)), TypeError,
     [EMBED, "expected a pair of leaf paths, or a TieGroup"]),
    ("pair with a number", lambda i: i.find((EMBED, 3)), TypeError, ["3)", "expected a pair"]),
    ("path instead of pairs", lambda i: i.find(EMBED), TypeError, [EMBED, "expected a pair"]),
    ("unknown leaf", lambda i: i.find((EMBED, "lm_head/kernl")), ValueError,
     ["'lm_head/kernl' is declared tied but is no leaf", "leaves with such a name", "kernel'"]),
    ("module instead of leaf", lambda i: i.find(("embed_tokens", HEAD)), ValueError,
     ["'embed_tokens' is declared tied but is no leaf"]),
    ("tied to itself", lambda i: i.find((UP, UP)), ValueError,
     [f"'{UP}' is declared tied to itself", "name two leaves"]),
    ("unknown orientation", lambda i: i.find((EMBED, HEAD, "flipped")), ValueError,
     ["'flipped'", "expected 'same' or 'transposed'"]),
    ("shapes do not fit", lambda i: i.find((EMBED, UP)), ValueError,
     [f"'{UP}' [8, 8]", f"'{EMBED}' [12, 8]", "would be [8, 12]", "Check ties=..."]),
    ("given orientation does not fit", lambda i: i.find((EMBED, HEAD, "same")), ValueError,
     [f"'{HEAD}' [8, 12]", f"'{EMBED}' [12, 8]", "leave one of them out"]),
    ("either orientation fits", lambda i: i.find((UP, "down/kernel")), ValueError,
     [f"'{UP}' and 'down/kernel' are both float32[8, 8]", "say which", "'same') or (..., 't"]),
    ("contradicting orientations",
     lambda i: i.find((UP, "down/kernel", "same"), (UP, "down/kernel", "transposed")), ValueError,
     ["tied to 'down/kernel' both as it is and transposed", "check ties"]),
    ("TieGroup of an unknown leaf", lambda i: i.find(TieGroup((Member(EMBED), Member("x")))),
     ValueError, ["'x' is declared tied but is no leaf"]),
    ("TieGroup that does not fit", lambda i: i.find(TieGroup((Member(EMBED), Member(HEAD)))),
     ValueError, [f"'{HEAD}' [8, 12]", "Check ties=..."]),
    ("config says neither", lambda i: tied_lora.find_ties(i.params, {"tie_word_embeddings": "yes"}),
     ValueError, ["tie_word_embeddings is 'yes'", "expected True or False"]),
    ("config of a model without a table",
     lambda i: tied_lora.find_ties({"up": i.params["up"]}, {"tie_word_embeddings": True}),
     ValueError, ["no leaf looks like the input embedding", "ties=[(embedding, head), ...]"]),
    ("config of a model with two tables",
     lambda i: tied_lora.find_ties({**i.params, "shared": i.params["embed_tokens"]},
                                   {"tie_word_embeddings": True}),
     ValueError, [EMBED, "shared/embedding", "say which with ties="]),
]  # fmt: skip

WRAP: list[Case] = [
    ("config is a dict", lambda i: tied_lora.wrap(i.params, {"r": 8}), TypeError,
     ["config is a dict", "expected a LoraConfig"]),
    ("sites is a list", lambda i: i.wrap("up", sites=[1]), TypeError,
     ["sites is a list", "expected what trace returns"]),
    ("no params", lambda i: tied_lora.wrap({}, i.config), ValueError,
     ["params has no leaves", "expected the params of an initialised model"]),
    ("wrapped already", lambda i: tied_lora.wrap(i.adapted, i.config), TypeError,
     ["wrapped already", "tied_lora.base(adapted)"]),
    ("params of an Adapted", lambda i: tied_lora.wrap(i.adapted.params, i.config), TypeError,
     [f"'{HEAD}' is a marker", "tied_lora.base(adapted)"]),
    ("an Adapted inside", lambda i: tied_lora.wrap({"params": i.adapted}, i.config), TypeError,
     ["wrapped already", "tied_lora.base(adapted)"]),
    ("rng is a number", lambda i: i.wrap("up", rng=0), TypeError,
     ["rng is a int", "jax.random.key(0)"]),
    ("no targets", lambda i: i.wrap(), ValueError, ["target_modules is None", "'embed_tokens'"]),
    ("target names nothing", lambda i: i.wrap("k_proj"), ValueError,
     ["target_modules=('k_proj',) names no leaf", "nearby: 'q_proj'", LINE]),
    ("regex names nothing", lambda i: i.wrap(target_modules=r"layers\..*"), ValueError,
     [r"'layers\\..*' names no leaf", LINE]),
    ("everything is excluded", lambda i: i.wrap("up", exclude_modules=["up/kernel"]), ValueError,
     ["target_modules=('up',) names no leaf"]),
    ("target of one axis", lambda i: i.wrap("norm"), ValueError,
     ["'norm' in target_modules names 'norm/scale' float32[8]", "two axes or more", "Take it out"]),
    ("target of integers", lambda i: i.wrap("counts"), ValueError,
     ["'counts/table' int32[4, 4]", "floating-point", "Take it out of target_modules"]),
    ("rank too high", lambda i: i.wrap("up", r=9), ValueError,
     ["rank 9 for 'up/kernel' float32[8, 8]", "8 at most", "rank_pattern"]),
    ("three axes and no sites", lambda i: i.wrap("q_proj"), ValueError,
     ["'q_proj/kernel' float32[8, 2, 4] has 3 axes", LINE]),
    ("three axes and other sites", lambda i: i.wrap("q_proj", sites=i.sites), ValueError,
     ["'q_proj/kernel', which none of the 1 call sites given reads", "sites | tied_lora.trace("]),
    ("all-linear without sites", lambda i: i.wrap(target_modules="all-linear"), ValueError,
     ['target_modules="all-linear"', LINE, "wrap(params, config, sites=sites)"]),
    ("all-linear with another model's sites",
     lambda i: i.wrap(target_modules="all-linear", sites=site("x/kernel", (0,), (1,))), ValueError,
     ["call sites given read 'x/kernel', which is no leaf of params", "nearby: 'down/kernel'"]),
    ("used in two ways",
     lambda i: i.wrap("q_proj", sites=site("q_proj/kernel", (0,), (1, 2))
                      | site("q_proj/kernel", (0, 1), (2,), "conv")), ValueError,
     ["'q_proj/kernel' float32[8, 2, 4] is used in two ways", "rows (0,)", "rows (0, 1)",
      "Take it out of target_modules"]),
    ("nothing remains", lambda i: i.wrap("up", sites=site(UP, (0, 1), ())), ValueError,
     [f"'{UP}' float32[8, 8] without rows or without columns", "take it out of target_modules"]),
    ("two ranks for one group",
     lambda i: i.wrap("embed_tokens", "lm_head", ties=[(EMBED, HEAD)], rank_pattern={"lm_head": 4}),
     ValueError, [f"'{EMBED}' is one tie group", "'lm_head': 4", "same rank and alpha"]),
    ("two alphas for one group",
     lambda i: i.wrap("embed_tokens", "lm_head", ties=[(EMBED, HEAD)],
                      alpha_pattern={"lm_head": 1}),
     ValueError, [f"'{EMBED}' is one tie group", "'lm_head': 0.5", "same rank and alpha"]),
    ("tied to another dtype", lambda i: i.wrap("up", ties=[(EMBED, "half/kernel")]), ValueError,
     ["'half/kernel' bfloat16[12, 8] is tied to", f"'{EMBED}' float32[12, 8]", "cast one of them"]),
    ("two leaves of one name",
     lambda i: i.wrap("up", params={"up/kernel": i.params["up"]["kernel"], "up": i.params["up"]}),
     ValueError, ["two leaves of the params are both named 'up/kernel'", "rename one"]),
    ("box without names",
     lambda i: i.wrap("up", params={"up": {"kernel": Box(i.params["up"]["kernel"])}}),
     ValueError, ["boxed in a Box, which has no axis names", "flax.linen.meta.unbox"]),
]  # fmt: skip

ADAPT: list[Case] = [
    ("no Adapted", lambda i: tied_lora.adapt(lambda p, x: x)(i.params, X), ValueError,
     ["no Adapted among the arguments (found ArrayImpl, dict)", "pass what wrap returns"]),
    ("no arguments", lambda i: tied_lora.adapt(lambda: 1)(), ValueError, ["found none"]),
    ("not a function", lambda i: tied_lora.adapt(i.params), TypeError,
     ["expected a function, got dict"]),
    ("unknown on_dense", lambda i: tied_lora.adapt(jnp.sin, on_dense="never"), ValueError,
     ["on_dense='never'", "expected 'warn', 'error' or 'allow'"]),
    ("densified and refused",
     lambda i: tied_lora.adapt(lambda p: jnp.sin(p["up"]["kernel"]), on_dense="error")(i.adapted),
     tied_lora.DensifyError, [f"'{UP}' is read by 'sin'", "256 bytes", "register_rule", '"allow"']),
    ("arrays hidden in an object",
     lambda i: tied_lora.adapt(lambda p: Hidden(X @ p["up"]["kernel"]))(i.adapted), TypeError,
     ["returned a Hidden whose field 'array' holds", "register_dataclass"]),
    ("dropout in a differentiated function",
     lambda i: tied_lora.adapt(jax.grad(twice, allow_int=True))(i.adapted.train(jax.random.key(0))),
     ValueError, ["dropout is on", f"'{UP}'", "tied_lora.value_and_grad", "adapted.eval()"]),
    ("explain without an Adapted", lambda i: tied_lora.explain(lambda p: p, i.params), ValueError,
     ["no Adapted among the arguments (found dict)"]),
    ("a leaf that was not read",
     lambda i: tied_lora.explain(lambda p: X @ p["up"]["kernel"], i.adapted).assert_tied(),
     tied_lora.NotTiedError, [f"'{EMBED}' is adapted and read nowhere"]),
    ("trace without params", lambda i: tied_lora.trace(lambda x: x, X), ValueError,
     ["found no params among the arguments", "expected a 'params' collection"]),
    ("rule for nothing", lambda i: tied_lora.register_rule(3, lambda: None), TypeError,
     ["expected a jax.extend.core.Primitive", "got int"]),
    ("gradient of plain params",
     lambda i: tied_lora.value_and_grad(lambda p: 0.0)(i.params), TypeError,
     ["the first argument is a dict", "expected an Adapted"]),
]  # fmt: skip

ADAPTED: list[Case] = [
    ("merge of plain params", lambda i: tied_lora.merge(i.params), TypeError,
     ["merge: expected an Adapted", "got dict"]),
    ("base of plain params", lambda i: tied_lora.base(i.params), TypeError,
     ["base: expected an Adapted", "got dict"]),
    ("merge to integers", lambda i: tied_lora.merge(i.adapted, dtype="int8"), TypeError,
     ["dtype='int8'", "expected a floating-point dtype"]),
    ("merge of stacked adapters", lambda i: tied_lora.merge(i.stacked), ValueError,
     [f"lora_a of '{EMBED}' is [2, 12, 2], expected [12, 2]", "merged one by one"]),
    ("stack of nothing", lambda i: tied_lora.stack([]), ValueError, ["at least one Adapted"]),
    ("stack of other ties", lambda i: tied_lora.stack([i.adapted, i.other]), ValueError,
     [f"{HEAD!r} is tied in one of the adapters' bases only", "same ties"]),
    ("stack of plain params", lambda i: tied_lora.stack([i.params]), TypeError,
     ["stack: expected an Adapted", "got dict"]),
    ("axes of plain params", lambda i: tied_lora.adapter_axes(i.params), TypeError,
     ["adapter_axes: expected an Adapted", "got dict"]),
    ("key is floats", lambda i: i.adapted.train(jnp.ones(2)), TypeError, ["rng is float32[2]"]),
    ("key is a number", lambda i: i.adapted.train(0), TypeError,
     ["rng is a int", "jax.random.key(0)"]),
    ("unknown field", lambda i: i.adapted.replace(adapter={}), TypeError, ["'adapter'"]),
    ("adapters of other groups", lambda i: i.adapted.replace(adapters=i.other.adapters), ValueError,
     ["not the plan's adapters", f"missing '{UP}'"]),
    ("adapters of more groups", lambda i: i.other.replace(adapters=i.adapted.adapters), ValueError,
     ["not the plan's adapters", f"unknown '{UP}'"]),
    ("adapters without their collection",
     lambda i: i.adapted.replace(adapters=i.adapted.adapters["lora"]), ValueError,
     ["expected a collection 'lora'", EMBED]),
    ("variables without params", lambda i: broken_variables(i.adapted, params=None), ValueError,
     ["no collection 'params'", "found 'lora_scaling', 'lora'"]),
    ("variables without scaling", lambda i: broken_variables(i.adapted, lora_scaling=None),
     ValueError, ["no collection 'lora_scaling'"]),
    ("variables without a group's scaling",
     lambda i: broken_variables(i.adapted, lora_scaling={UP: jnp.ones(())}), ValueError,
     ["in 'lora_scaling'", f"missing '{EMBED}'"]),
    ("variables of other shapes",
     lambda i: broken_variables(i.adapted, **lora(i.adapted, UP, lora_a=jnp.ones((8, 3)))),
     ValueError, [f"lora_a of '{UP}' is float32[8, 3]", "the plan has [8, 2]"]),
    ("variables without a factor",
     lambda i: broken_variables(i.adapted, **lora(i.adapted, UP, lora_b=None)), ValueError,
     [f"'{UP}'", "lora_b", "found 'lora_a'"]),
    ("variables of another plan",
     lambda i: tied_lora.Adapted.from_variables(i.adapted.variables(), i.other.plan), ValueError,
     ["not the plan's adapters", f"unknown '{UP}'"]),
    ("JSON of a plan as sites", lambda i: CallSites.from_json(i.adapted.plan.to_json()), ValueError,
     ["not the JSON of call sites"]),
    ("JSON of sites as a plan", lambda i: Plan.from_json(i.sites.to_json()), ValueError,
     ["not the JSON of a plan"]),
    ("JSON of a later format",
     lambda i: Plan.from_json(i.adapted.plan.to_json().replace('"format": 1', '"format": 9')),
     ValueError, ["format 9; expected 1"]),
]  # fmt: skip


CASES = [*TIES, *WRAP, *ADAPT, *ADAPTED]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


@pytest.mark.parametrize(
    ("case", "error", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(inputs, case, error, words):
    before = inputs.snapshot()
    with pytest.raises(error) as caught:
        case(inputs)
    assert type(caught.value) is error
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert inputs.snapshot() == before


def test_there_are_enough_of_them():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 40


def test_every_message_says_whose_it_is(inputs):
    own = re.compile(
        r"(wrap|find_ties|adapt|merge|base|stack|adapter_axes|trace|register_rule|value_and_grad|"
        r"assert_tied|Adapted[.\w]*): |not the JSON|these are not|two leaves of the params|"
        r"Adapted.__init__"
    )
    for _, case, error, _ in CASES:
        with pytest.raises(error) as caught:
            case(inputs)
        assert own.match(str(caught.value)), str(caught.value)
