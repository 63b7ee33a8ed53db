"""A plan's JSON that somebody has edited: a ValueError, or a plan that is one."""

from __future__ import annotations

import contextlib
import json
import random

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._planning.plan import Plan
from tests.helpers.edited_json import edited
from tests.helpers.saved_base import TIES, base_params


def content(**fields):
    """The JSON of a plan with a table that is tied, a kernel, and all kinds of adapters."""
    fields = {"trainable_token_indices": {"embed": [1, 5]}, "modules_to_save": ["more"], **fields}
    config = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"], **fields)
    params = {**base_params(), "more": {"kernel": jnp.ones((4, 4))}}
    return json.loads(tied_lora.wrap(params, config, ties=TIES).plan.to_json())


def separate():
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed", "head"], ensure_weight_tying=False, bias="all"
    )
    with pytest.warns(tied_lora.WeightTyingWarning):
        plan = tied_lora.wrap(base_params(), config, ties=TIES).plan
    return json.loads(plan.to_json())


def with_dora():
    return content(use_dora=True, trainable_token_indices=None)


def group(plan, kind):
    return next(g for g in plan["groups"] if any(a["kind"] == kind for a in g["adapters"]))


def adapter(plan, kind):
    return next(a for g in plan["groups"] for a in g["adapters"] if a["kind"] == kind)


SPAN = {"span": [0, 0, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(groups={}), r"plan\.groups is \{\}; expected a list"),
        (lambda p: p.update(config=[]), r"plan\.config is \[\]; expected an object"),
        (lambda p: p.update(colour=1), r"plan has a field 'colour'; expected none but format"),
        (lambda p: p["groups"].insert(0, 3), r"groups\[0\] is 3; expected an object"),
        (lambda p: p["groups"][0].pop("dtype"), r"KeyError\('groups\[0\]\.dtype'\)"),
        (
            lambda p: p["groups"][0].update(shape=[64, -16]),
            r"shape is \[64, -16\]; expected a l",
        ),
        (
            lambda p: p["groups"][0].update(shape=[64, True]),
            r"shape is .*; expected a list of ints",
        ),
        (lambda p: p["groups"][0].update(shape=[2**64]), r"shape is .*; expected a list of ints"),
        (lambda p: p["groups"][0].update(is_table=1), "is_table is 1; expected true or false"),
        (lambda p: p["groups"][0].update(found="declared"), "found is .*; expected a list of str"),
        (lambda p: p["groups"][0].update(rows=[2]), r"batch are .*; expected axes of \[64, 16\]"),
        (lambda p: p["groups"][0].update(cols=[0]), r"batch are .*; expected axes of \[64, 16\]"),
        (lambda p: p["groups"][0].update(members=[]), r"members: expected a leaf first that is"),
        (lambda p: p["groups"][0]["members"].reverse(), r"members: expected a leaf first that is"),
        (lambda p: p["groups"][0].update(shape=[64, 16, 2]), "is transposed; expected a matrix"),
        (lambda p: p["groups"][0]["members"][1].update(path=None), "path is None; expected a str"),
        (lambda p: p["groups"].append(p["groups"][0]), "the leaf 'embed/embedding' is there twice"),
        (
            lambda p: p["groups"][0]["adapters"].append(p["groups"][0]["adapters"][0]),
            "the adapter 'lora embed/embedding' is there twice",
        ),
        (
            lambda p: adapter(p, "lora").update(kind="loha"),
            "kind is 'loha'; expected one of 'lor",
        ),
        (lambda p: adapter(p, "lora").update(kind=[]), r"kind is \[\]; expected one of 'lora'"),
        (lambda p: adapter(p, "lora").update(rank=0), "factors of rank 0; expected a rank, rows"),
        (lambda p: adapter(p, "lora").update(rank=2.0), "rank is 2.0; expected an int of at least"),
        (lambda p: group(p, "lora").update(rows=[]), "factors of rank 2; expected a rank, rows"),
        (lambda p: adapter(p, "lora").update(members=["../x"]), r"members: expected leaves of \["),
        (lambda p: adapter(p, "lora").update(span=[0, 0]), "span is .*; expected an axis, a start"),
        (lambda p: adapter(p, "lora").update(span=[0, 9, 2]), r"span is .*; expected a part of \["),
        (lambda p: adapter(p, "lora").update(span=[2, 0, 1]), r"span is .*; expected a part of \["),
        (lambda p: adapter(p, "lora").update(sites=[]), r"sites is \[\]; expected an object, or"),
        (
            lambda p: adapter(p, "trainable_tokens").update(tokens=[]),
            "different ones, each below 6",
        ),
        (
            lambda p: adapter(p, "trainable_tokens").update(tokens=[1, 1]),
            "different ones, each bel",
        ),
        (
            lambda p: adapter(p, "trainable_tokens").update(tokens=[64]),
            "different ones, each below",
        ),
        (lambda p: p["config"].update(eva_config={}), "eva_config"),
    ],
)
def test_what_is_no_plan(change, message):
    plan = content()
    change(plan)
    with pytest.raises(ValueError, match=f"not the JSON of a plan: .*{message}"):
        Plan.from_json(json.dumps(plan))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"role": "head"},
            "role is 'head'; expected one of None, 'lookup', 'projection', 'oth",
        ),
        ({"scope": 3}, "scope is 3; expected a string, or null"),
        ({"others": [{"role": None, "scope": None, "others": [1]}]}, "expected an empty list"),
        ({"others": [3]}, r"others\[0\] is 3; expected an object"),
    ],
)
def test_sites_that_are_none(sites, message):
    plan = separate()
    adapter(plan, "lora")["sites"] = {"role": None, "scope": "head", "others": [], **sites}
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(plan))


def test_a_plan_of_before_there_were_parts():
    plan = content()
    for g in plan["groups"]:
        for a in g["adapters"]:
            del a["span"]
    assert Plan.from_json(json.dumps(plan)) is Plan.from_json(json.dumps(content()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [content, separate, with_dora])
def test_edits_at_random(make):
    rng, plan, read = random.Random(0), make(), 0
    for _ in range(400):
        with contextlib.suppress(ValueError):
            found = Plan.from_json(json.dumps(edited(rng, plan)))
            assert Plan.from_json(found.to_json()) is found
            for g, a in found.adapters():
                assert all(n >= 0 for shape in g.shapes(a).values() for n in shape)
            read += 1
    assert 0 < read < 300
