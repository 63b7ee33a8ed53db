"""Labels for the trainable arrays, on plans made by hand: every kind of adapter, every layout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._planning.plan import AdapterPlan
from flax_tied_lora.train import labels, labels_by
from tests.helpers.small_models import TOKENS, StackedLM, init, wrapped

LORA, COPY, ROWS, BIAS = "lora", "modules_to_save", "trainable_tokens", "bias"
TABLE = "embed_tokens/embedding"


def group(key, *adapters, shape=(8, 6), table=False, others=()):
    """A group of the plan; ``others`` are its transposed members."""
    members = (tied_lora.Member(key), *(tied_lora.Member(m, True) for m in others))
    rows, cols = ((), ()) if len(shape) < 2 else ((0,), (1,))
    return tied_lora.GroupPlan(
        members, (), shape, "float32", rows, cols, is_table=table, adapters=adapters
    )


def plan(*groups):
    return tied_lora.Plan.of(groups, tied_lora.LoraConfig(target_modules=["q_proj"]))


def lora(key, name="", **fields):
    return AdapterPlan(LORA, f"{key}:{name}" if name else key, name, rank=2, **fields)


def layer(index):
    base = f"model/layers/{index}"
    return (
        group(f"{base}/q_proj/kernel", lora(f"{base}/q_proj/kernel")),
        group(f"{base}/q_proj/bias", AdapterPlan(BIAS, f"{base}/q_proj/bias"), shape=(6,)),
        group(f"{base}/up/kernel", lora(f"{base}/up/kernel", dora=True)),
    )


EVERY_KIND = plan(
    group(TABLE, lora(TABLE), table=True, others=("lm_head/kernel",)),
    *layer(0),
    *layer(1),
    group("score/kernel", AdapterPlan(COPY, "score/kernel")),
    group("wpe/embedding", AdapterPlan(ROWS, "wpe/embedding", tokens=(1, 3)), table=True),
    group("frozen/kernel", others=("tied/kernel",)),
)


# What each array is


def test_every_kind_of_adapter():
    pair = {"lora_a": "lora_a", "lora_b": "lora_b"}
    assert labels(EVERY_KIND) == {
        LORA: {
            TABLE: {"lora_a": "embedding", "lora_b": "embedding"},
            "model/layers/0/q_proj/kernel": pair,
            "model/layers/1/q_proj/kernel": pair,
            "model/layers/0/up/kernel": {**pair, "lora_magnitude": "lora_magnitude"},
            "model/layers/1/up/kernel": {**pair, "lora_magnitude": "lora_magnitude"},
        },
        BIAS: {f"model/layers/{i}/q_proj/bias": BIAS for i in (0, 1)},
        COPY: {"score/kernel": COPY},
        ROWS: {"wpe/embedding": ROWS},
    }


def test_without_factors_the_collection_is_there_and_empty():
    only = plan(group("score/kernel", AdapterPlan(COPY, "score/kernel")))
    assert labels(only) == {LORA: {}, COPY: {"score/kernel": COPY}}


EMBEDDING = ("embedding", "embedding")
HEAD = ("lora_b", "lora_a")  # of lora_a and lora_b: the head's inputs are the table's columns


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sites": SiteFilter(role="lookup")}, EMBEDDING),
        ({"sites": SiteFilter(role="projection")}, HEAD),
        ({"sites": SiteFilter(scope="encoder/shared")}, EMBEDDING),
        ({"sites": SiteFilter(others=(SiteFilter(role="lookup"),))}, HEAD),
        ({"sites": SiteFilter(others=(SiteFilter(role="projection"),))}, EMBEDDING),
        ({"members": ("lm_head/w",)}, HEAD),
        ({"members": ("generator/kernel",)}, HEAD),
        ({"members": (TABLE,)}, EMBEDDING),
        ({"members": ("shared/embedding",)}, EMBEDDING),
        ({"members": (TABLE, "lm_head/w")}, EMBEDDING),
    ],
)
def test_separate_adapters_of_a_table(fields, expected):
    of = group(TABLE, lora(TABLE, "part", **fields), table=True, others=("lm_head/w",))
    stored_alike = tuple(map(tied_lora.Member, ("generator/kernel", "shared/embedding")))
    found = labels(plan(dataclasses.replace(of, members=of.members + stored_alike)))
    assert found[LORA] == {f"{TABLE}:part": dict(zip(("lora_a", "lora_b"), expected, strict=True))}


def test_labels_of_an_adapted_model_fit_optax(standard_promotion):
    params = init(StackedLM())
    sites = tied_lora.trace(StackedLM().apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["embed_tokens", "q_proj", "lm_head"], sites=sites)
    found = labels(adapted)
    assert found == labels(adapted.plan)
    assert jax.tree.structure(found) == jax.tree.structure(adapted.adapters)
    transforms = {
        "lora_a": optax.set_to_zero(), "lora_b": optax.sgd(1.0), "embedding": optax.sgd(0.5)
    }  # fmt: skip
    optimizer = optax.partition(transforms, found)
    ones = jax.tree.map(jnp.ones_like, adapted.adapters)
    updates, _ = optimizer.update(ones, optimizer.init(adapted.adapters), adapted.adapters)
    rates = {
        key: {name: float(x.ravel()[0]) for name, x in pair.items()}
        for key, pair in updates["lora"].items()
    }
    assert rates == {
        "embed_tokens/embedding": {"lora_a": -0.5, "lora_b": -0.5},
        "layers/layer/q_proj/kernel": {"lora_a": 0.0, "lora_b": -1.0},
        "lm_head/kernel": {"lora_a": 0.0, "lora_b": -1.0},
    }


# By layer and name


def by(rules, of=EVERY_KIND, **options):
    """The rules' labels of the adapters' keys, each of which has one for all its arrays."""
    found = labels_by(of, rules, **options)
    assert jax.tree.structure(found) == jax.tree.structure(labels(of))
    result = {}
    for collection, entries in found.items():
        for key, entry in entries.items():
            values = set(jax.tree.leaves(entry))
            assert len(values) == 1, (collection, key)
            result[key] = values.pop()
    return result


def keys_of(rule, of=EVERY_KIND):
    return {key for key, label in by({rule: "hit"}, of).items() if label == "hit"}


def test_layers():
    found = by({0: 1e-5, 1: 2e-5}, default=1e-3)
    assert found == {
        key: {"0": 1e-5, "1": 2e-5}.get(key.split("/")[2] if "layers" in key else "", 1e-3)
        for key in found
    }
    assert len(found) == 9


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("q_proj", {f"model/layers/{i}/q_proj/{x}" for i in (0, 1) for x in ("kernel", "bias")}),
        ("q_proj/kernel", {f"model/layers/{i}/q_proj/kernel" for i in (0, 1)}),
        ("layers.1.up", {"model/layers/1/up/kernel"}),
        ("layers/0/q.*", {f"model/layers/0/q_proj/{x}" for x in ("kernel", "bias")}),
        ("score|wpe", {"score/kernel", "wpe/embedding"}),
        ("embed_tokens", {TABLE}),
        ("lm_head", {TABLE}),
        ("lm_head.kernel", {TABLE}),
        (TABLE, {TABLE}),
    ],
)  # fmt: skip
def test_names(rule, expected):
    assert keys_of(rule) == expected


def test_names_of_separate_adapters():
    separate = (
        lora(TABLE, "embed_tokens", sites=SiteFilter(role="lookup")),
        lora(TABLE, "lm_head", members=("lm_head/kernel",)),
    )
    of = plan(group(TABLE, *separate, table=True, others=("lm_head/kernel",)))
    assert keys_of("embed_tokens", of) == {f"{TABLE}:embed_tokens"}
    assert keys_of("lm_head", of) == {f"{TABLE}:lm_head"}
    assert keys_of("lm_head/kernel", of) == {f"{TABLE}:lm_head"}
    assert keys_of(f"{TABLE}:lm_head", of) == {f"{TABLE}:lm_head"}


def test_the_first_rule_that_fits_wins():
    found = by({"up": "up", 1: "one", "q_proj": "q"}, default="rest")
    assert found["model/layers/1/up/kernel"] == "up"
    assert found["model/layers/1/q_proj/kernel"] == "one"
    assert found["model/layers/0/q_proj/kernel"] == "q"
    assert found[TABLE] == "rest"
    # One that is always forestalled fits all the same.
    assert "hidden" not in by({"up": "up", "layers.0.up": "hidden"}).values()
    assert set(by({}, default=7).values()) == {7}


# What is refused


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q_prj": 1}, "the rule 'q_prj' fits no adapter; there are .*q_proj/"),
        ({2: 1}, "the rule 2 fits no adapter"),
        ({"frozen": 1}, "the rule 'frozen' fits no adapter"),
        ({"layers.0": 1}, "fits no adapter.*a string is a regex for the end of the path"),
        ({"(": 1}, r"the rule '\(' is no regex: .*unterminated"),
        ({"": 1}, "the rule '' fits no adapter"),
    ],
)
def test_rules_that_fit_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        labels_by(EVERY_KIND, rules)


def test_stacked_layers_have_no_index():
    params = init(StackedLM())
    sites = tied_lora.trace(StackedLM().apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["q_proj"], sites=sites)
    with pytest.raises(ValueError, match=r"the rule 0 fits no .*layers stacked in one array"):
        labels_by(adapted, {0: "first"})


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ([0, 1], {}, "rules is a list; expected a dict"),
        ({1.5: 1}, {}, "found the rule 1.5; expected the index of a layer or a regex"),
        ({True: 1}, {}, "found the rule True"),
        ({"up": ("a", "b")}, {}, r"found the label \('a', 'b'\); expected a string or a number"),
        ({"up": None}, {}, "found the label None"),
        ({"up": [1]}, {}, r"found the label \[1\]"),
        ({"up": 1}, {"default": None}, "found the label None"),
    ],
)
def test_rules_of_another_type(rules, options, message):
    with pytest.raises(TypeError, match=message):
        labels_by(EVERY_KIND, rules, **options)


def test_adapters_alone_are_refused():
    for adapters in ({"lora": {}}, None, jnp.ones(3)):
        for fn in (labels, lambda x: labels_by(x, {})):
            with pytest.raises(TypeError, match="expected an Adapted, as wrap returns it, or its"):
                fn(adapters)
