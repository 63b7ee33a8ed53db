"""Axes said in the config, and call sites that disagree; layers that are stacked in one leaf."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from tests.helpers.oracle import array, check, numbers, perturbed
from tests.helpers.small_models import TOKENS, StackedLM, init

KERNEL = {"m": {"kernel": array(4, 4, 4, seed=1)}}
X = array(3, 4, seed=2)
PAIRS = array(3, 4, 4, seed=3)


def einsum(formula, *data):
    return lambda p: jnp.einsum(formula, *data, p["m"]["kernel"])


IN = einsum("bd,dhk->bhk", X)  # rows (0,), columns (1, 2)
OUT = einsum("bdh,dhk->bk", PAIRS)  # rows (0, 1), columns (2,)
ALL = einsum("abc,abc->", array(4, 4, 4))


def wrapped(config, *forms, params=KERNEL):
    sites = None
    for form in forms:
        own = tied_lora.trace(form, params)
        sites = own if sites is None else sites | own
    return perturbed(
        tied_lora.wrap(params, LoraConfig(r=1, target_modules=["m"], **config), sites=sites)
    )


def axes(adapted):
    [group] = adapted.plan.adapted
    return group.rows, group.cols, group.batch


@pytest.mark.parametrize("name", ["m", "m/kernel", ".*ker.*"])
@pytest.mark.parametrize(("said", "expected"), [
    ((1, 2), ((1,), (2,), (0,))),
    ((-1, [0]), ((2,), (0,), (1,))),
    (([0, 1], 2), ((0, 1), (2,), ())),
])  # fmt: skip
def test_axes_said_need_no_trace(name, said, expected):
    adapted = wrapped({"axes": {name: said}})
    assert axes(adapted) == expected
    rows, cols, batch = expected
    shapes = {name: x.shape for name, x in adapted.adapters["lora"]["m/kernel"].items()}
    near, far = len((*batch, *rows)), len(cols)
    assert shapes == {"lora_a": (*[4] * near, 1), "lora_b": (*[4] * len(batch), 1, *[4] * far)}


def test_axes_said_of_a_transposed_member():
    params = {"embed": {"embedding": array(6, 4)}, "head": {"kernel": array(4, 6)}}
    ties = [("embed/embedding", "head/kernel")]

    def group(**said):
        config = LoraConfig(r=1, target_modules=["embed"], axes=said)
        return tied_lora.wrap(params, config, ties=ties).plan.adapted[0]

    assert (group(head=(0, 1)).rows, group(embed=(0, 1)).rows) == ((1,), (0,))
    with pytest.raises(ValueError, match=r"axes says .*'embed/embedding' .*'head/kernel'"):
        group(head=(0, 1), embed=(0, 1))


def test_sites_that_disagree_are_served_by_axes_said():
    with pytest.raises(ValueError, match="two ways that no one pair") as error:
        wrapped({}, IN, OUT)
    text = str(error.value)
    assert "dot_general #0 of 'm/kernel' (projection): rows (0,), columns (1, 2)" in text
    assert "rows (0, 1), columns (2,)" in text
    assert 'axes={"m": (rows, columns)}' in text
    adapted = wrapped({"axes": {"m": (0, 2)}}, IN, OUT)
    assert axes(adapted) == ((0,), (2,), (1,))
    explained = check(lambda p: (IN(p), OUT(p)), adapted)
    assert {r.served for r in explained.reads} == {"low rank"}


@pytest.mark.parametrize(("said", "forms", "words"), [
    ((1, [0, 2]), [IN], r"rows \(1,\) and columns \(0, 2\).*dot_general #0.*rows \(0,\), col"),
    ((2, 0), [IN], r"rows \(2,\) and columns \(0,\), and it is used otherwise"),  # the wrong way
    ((0, [1, 2]), [IN, OUT], r"columns \(1, 2\), and.*rows \(0, 1\), columns \(2,\)"),
    ((1, 2), [IN], r"rows \(1,\) and columns \(2,\), and it is used otherwise"),
    ((0, 3), [], r"'m/kernel' \[4, 4, 4\], which has no axis 3; expected 0 to 2"),
    ((0, [1, 0]), [], "an axis is there twice"),
    (([0, -3], 1), [], "an axis is there twice"),
])  # fmt: skip
def test_axes_that_cannot_be(said, forms, words):
    with pytest.raises(ValueError, match=f"(?s)wrap: axes.*{words}"):
        wrapped({"axes": {"m": said}}, *forms)


@pytest.mark.parametrize(("form", "words"), [
    (ALL, r"leaves 'm/kernel' .* without rows or without columns.*axes="),
    (lambda p: p["m"]["kernel"].reshape(16, 4).T.reshape(8, 8) @ array(8, 2),
     r"rows and columns of 'm/kernel' .* in one axis"),
    (lambda p: jnp.sin(p["m"]["kernel"]),
     r"names 'm/kernel' .*, which is read by sin only.*by its whole path"),
])  # fmt: skip
def test_sites_without_rows_and_columns(form, words):
    with pytest.raises(ValueError, match=f"(?s)wrap: .*{words}"):
        wrapped({}, form)


def test_entries_that_are_picked_say_nothing_of_axes():
    params = {"m": {"embedding": array(8, 6)}}

    def picked(p):
        return jnp.take_along_axis(p["m"]["embedding"], numbers(3, 6, below=8), axis=0)

    def both(p):
        return picked(p), array(2, 6) @ p["m"]["embedding"].T

    for form in (picked, both):
        adapted = wrapped({}, form, params=params)
        assert axes(adapted) in [((0,), (1,), ()), ((1,), (0,), ())]
        assert {r.served for r in check(form, adapted).reads} == {"low rank"}


def test_a_leaf_that_is_only_transformed_has_the_axes_said():
    config = LoraConfig(r=1, target_modules=["m/kernel"])
    sites = tied_lora.trace(lambda p: jnp.sin(p["m"]["kernel"]), KERNEL)
    with pytest.raises(ValueError, match=r"read by sin only.*LoraConfig\(axes="):
        tied_lora.wrap(KERNEL, config, sites=sites)
    with pytest.raises(ValueError, match="is not known, as it is read at none of these sites"):
        tied_lora.wrap(KERNEL, config, sites=tied_lora.CallSites())
    adapted = wrapped({"axes": {"m": (0, [1, 2])}})
    check(lambda p: jnp.sin(p["m"]["kernel"]), adapted, on_dense="allow")


@pytest.mark.parametrize("field", ["axes", "parts"])
@pytest.mark.parametrize("value", [
    1, {"m": 1}, {"m": (0,)}, {"m": (0, 1, 2)}, {"m": ("a", 1)}, {"m": (0, True)}, {"(": (0, 1)},
    {"m": (0, [])}, {"m": (0, ["q", "q"])}, {"m": (0, ["a:b"])}, {"m": (0, {"q": 0})}, {1: (0, 1)},
])  # fmt: skip
def test_fields_of_a_wrong_form(field, value):
    with pytest.raises((TypeError, ValueError), match=rf"LoraConfig: {field}.*expected"):
        LoraConfig(target_modules=["m"], **{field: value})


def test_the_config_keeps_them_under_a_key_of_its_own():
    config = LoraConfig(
        target_modules=["m"], axes={"m": (0, [1, 2])},
        parts={"qkv": (-1, ["q", "k"]), "o": (0, {"a": 3})},
    )  # fmt: skip
    assert config.to_dict()["flax_tied_lora"] == {
        "axes": {"m": [[0], [1, 2]]}, "parts": {"qkv": [-1, ["q", "k"]], "o": [0, {"a": 3}]}
    }  # fmt: skip
    assert LoraConfig.from_json(config.to_json()) == config
    assert hash(LoraConfig.from_json(config.to_json())) == hash(config)
    assert "flax_tied_lora" not in LoraConfig(target_modules=["m"]).to_dict()
    with pytest.raises(TypeError, match="flax_tied_lora=1; expected a mapping"):
        LoraConfig.from_dict({"flax_tied_lora": 1})


@pytest.mark.parametrize("field", ["axes", "parts"])
def test_what_is_said_of_no_target_warns(field):
    said = {"zzz": (0, ["a", "b"]) if field == "parts" else (0, 1)}
    with pytest.warns(tied_lora.UnmatchedTargetWarning, match=f"'zzz' in {field}.*'m'"):
        wrapped({field: said, "axes": {"m": (0, 1)} | (said if field == "axes" else {})})


# Layers that are stacked in one leaf

STACKED = init(StackedLM())
SITES = tied_lora.trace(StackedLM().apply, {"params": STACKED}, TOKENS)


@pytest.mark.parametrize(("fields", "words"), [
    ({"layers_to_transform": [0]}, "layers_to_transform=.* does not tell apart"),
    ({"target_modules": ["layers.0.layer.q_proj"]}, "'layers.0.layer.q_proj' does not tell apart"),
    ({"target_modules": ["layers_2.q_proj"]}, "'layers_2.q_proj' does not tell apart"),
    ({"rank_pattern": {r"layers.0.*q_proj": 1}}, "in rank_pattern is for one layer"),
    ({"alpha_pattern": {r"layers_1.*q_proj": 1}}, "in alpha_pattern is for one layer"),
])  # fmt: skip
def test_one_layer_of_a_stack(fields, words):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    with pytest.raises(ValueError, match=words) as error:
        tied_lora.wrap(STACKED, config, sites=SITES)
    assert "'layers/layer/q_proj/kernel' float32[3, 8, 2, 4]" in str(error.value)
    assert 'parts={"q_proj": (0, {"first": 1, "rest": 2})}' in str(error.value)


def test_some_layers_of_a_stack_as_parts():
    config = LoraConfig(
        r=2, target_modules=["q_proj:first", "q_proj:last"],
        parts={"q_proj": (0, {"first": 1, "middle": 1, "last": 1})},
        rank_pattern={"q_proj:last": 1},
    )  # fmt: skip
    adapted = perturbed(tied_lora.wrap(STACKED, config, sites=SITES))
    model = StackedLM()
    explained = check(lambda p, t: model.apply({"params": p}, t), adapted, TOKENS)
    assert {r.served for r in explained.reads} == {"low rank"}
    change = (
        tied_lora.merge(adapted)["layers"]["layer"]["q_proj"]["kernel"]
        - (STACKED["layers"]["layer"]["q_proj"]["kernel"])
    )
    ranks = [jnp.linalg.matrix_rank(m.reshape(8, 8), rtol=1e-4) for m in change]
    assert list(map(int, ranks)) == [2, 0, 1]


def test_scanned_layers_in_a_loop_of_ones_own():
    params = {"m": {"kernel": array(3, 4, 4)}}

    def fn(p, x):
        return lax.scan(lambda c, w: (c @ w, None), x, p["m"]["kernel"])[0]

    adapted = wrapped({}, lambda p: fn(p, X), params=params)
    assert axes(adapted) == ((1,), (2,), (0,))
    assert {r.served for r in check(fn, adapted, X).reads} == {"low rank"}
