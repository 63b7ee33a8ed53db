"""Targets: names, regexes, all-linear, scopes, roles; layers and exclusions; axes from sites."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from tests.helpers.deep_model import PARAMS, SITES, TABLE, adapted_keys, kernels
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["q_proj"], kernels("q_proj")),
        (["layers_1.q_proj"], kernels("q_proj", [1])),
        (["layers_1/q_proj/kernel", "v_proj"], kernels("q_proj", [1]) | kernels("v_proj")),
        (["embed_tokens"], {TABLE}),
        (["embedding"], {TABLE}),
        (r".*[/.](q|v)_proj", kernels("q_proj") | kernels("v_proj")),
        (r"layers_[02]/v_proj", kernels("v_proj", [0, 2])),
        (r".*kernel", kernels("q_proj") | kernels("v_proj")),
    ],
)
def test_names_and_regexes(targets, keys):
    assert adapted_keys(targets) == keys


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"exclude_modules": ["layers_1.q_proj"]}, kernels("q_proj", [0, 2])),
        ({"exclude_modules": ["kernel"], "target_modules": ["q_proj", "embed_tokens"]}, {TABLE}),
        ({"exclude_modules": r"layers_[01].*"}, kernels("q_proj", [2])),
        ({"layers_to_transform": 1}, kernels("q_proj", [1])),
        ({"layers_to_transform": [0, 2]}, kernels("q_proj", [0, 2])),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, kernels("q_proj", [2])),
        ({"layers_to_transform": [2], "layers_pattern": ["h", "layers"]}, kernels("q_proj", [2])),
    ],
)
@pytest.mark.filterwarnings("ignore::flax_tied_lora.UnmatchedTargetWarning")
def test_exclusions_and_layers(options, keys):
    assert adapted_keys(**{"targets": ["q_proj"], **_renamed(options)}) == keys


def _renamed(options):
    return {("targets" if k == "target_modules" else k): v for k, v in options.items()}


def test_no_layer_is_left():
    with pytest.raises(ValueError, match="names no leaf, module or call site"):
        adapted_keys(["q_proj"], layers_to_transform=[7])


# Scopes and roles


def test_head_without_a_leaf_is_known_by_its_scope():
    config = LoraConfig(r=2, target_modules=["lm_head"])
    plan = tied_lora.wrap(PARAMS, config, sites=SITES).plan
    assert [(a.key, a.targets) for _, a in plan.adapters()] == [(TABLE, ("lm_head",))]
    with pytest.raises(ValueError, match=r"sites = tied_lora.trace\(model.apply"):
        tied_lora.wrap(PARAMS, config)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_table_of_another_name_is_known_by_its_role(target):
    def fn(params, ids):
        return params["wte"]["table"][ids] @ params["wte"]["table"].T

    params = {"wte": {"table": jnp.ones((12, 8))}}
    sites = tied_lora.trace(fn, params, jnp.array([1]))
    assert adapted_keys([target], params, sites) == {"wte/table"}
    untied = tied_lora.trace(lambda p, i: p["wte"]["table"][i], params, jnp.array([1]))
    with pytest.raises(ValueError, match="names no leaf"):
        adapted_keys([target], params, untied)


def test_path_comes_before_scope_and_role():
    params = {**PARAMS, "lm_head": {"kernel": jnp.ones((8, 4))}}
    head = tied_lora.CallSite("lm_head/kernel", "dot_general", 0, "", "projection", (0,), (1,))
    sites = SITES | tied_lora.CallSites((head,))
    assert adapted_keys(["lm_head"], params, sites) == {"lm_head/kernel"}


@pytest.mark.parametrize(
    ("target", "instead"),
    [("lm_head", "'embed_tokens/embedding' is read in its place: name that, or take 'lm_head"),
     ("left_over", r"take it out of target_modules, or add the call sites of the function")],
)  # fmt: skip
def test_a_leaf_that_none_of_the_sites_reads_is_refused(target, instead):
    """A tied model may have kept the leaf of an untied head: nothing would read its adapter."""
    params = {**PARAMS, target: {"kernel": jnp.ones((8, 4))}}
    expected = f"{target!r} in target_modules names '{target}/kernel', which none of .*{instead}"
    with pytest.raises(ValueError, match=expected):
        adapted_keys([target], params, SITES)
    with pytest.raises(ValueError, match=expected):
        adapted_keys(["embed_tokens", target], params, SITES)
    assert adapted_keys([target], params) == {f"{target}/kernel"}  # no sites: it is not known


def test_an_exclusion_that_excludes_nothing_is_said():
    params = {**PARAMS, "up": {"kernel": jnp.ones((4, 4))}}
    for excluded in (["embed_tokens", "no_such"], "no_such.*"):
        with pytest.warns(
            tied_lora.UnmatchedTargetWarning, match="'no_such.* in exclude_modules names no leaf"
        ) as caught:
            adapted_keys(["up"], params, exclude_modules=excluded)
        assert len(caught) == 1


def test_scopes_are_excluded_from_all_linear_too():
    def model(params, x):
        with jax.named_scope("layer_0/query"):
            x = x @ params[0]
        with jax.named_scope("layer_0/value"):
            return x @ params[1]

    params = [jnp.ones((4, 4)), jnp.ones((4, 4))]
    sites = tied_lora.trace(model, params, jnp.ones((2, 4)))
    assert adapted_keys("all-linear", params, sites) == {"0", "1"}
    assert adapted_keys("all-linear", params, sites, exclude_modules=["layer_0/query"]) == {"1"}
    assert adapted_keys("all-linear", params, sites, exclude_modules=["value"]) == {"0"}


def test_several_targets_of_one_group():
    config = LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"])
    [group] = tied_lora.wrap(PARAMS, config, sites=SITES).plan.adapted
    assert group.adapters[0].targets == ("lm_head", "embed_tokens")


# Biases and scales are not what a module's name means


def test_biases_of_two_axes_are_left_alone():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    assert adapted_keys(["q_proj"], params, sites) == {"layers/layer/q_proj/kernel"}
    flat = {"q_proj": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones((2, 4))}}
    assert adapted_keys(["q_proj"], flat) == {"q_proj/kernel"}
    assert adapted_keys(["q_proj/bias"], flat) == {"q_proj/bias"}


# Axes


def test_axes_come_from_the_sites():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"])
    plan = tied_lora.wrap(params, config, sites=sites).plan
    axes = {g.key.split("/")[-2]: (g.batch, g.rows, g.cols, g.is_table) for g in plan.adapted}
    assert axes == {
        "embed_tokens": ((), (0,), (1,), True),
        "q_proj": ((0,), (1,), (2, 3), False),
        "o_proj": ((0,), (1, 2), (3,), False),
        "lm_head": ((), (0,), (1,), False),
    }


def test_kernel_that_is_used_transposed_has_its_summed_axis_as_rows():
    params = {"w": jnp.ones((6, 4))}
    sites = tied_lora.trace(lambda p, x: x @ p["w"].T, params, jnp.ones((2, 4)))
    [group] = tied_lora.wrap(
        params, LoraConfig(r=2, target_modules=["w"]), sites=sites
    ).plan.adapted
    assert (group.rows, group.cols) == ((1,), (0,))
    assert group.shapes(group.adapters[0]) == {"lora_a": (4, 2), "lora_b": (2, 6)}


def test_tied_table_has_the_rows_of_its_lookup():
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    with_sites = tied_lora.wrap(PARAMS, config, sites=SITES).plan.adapted[0]
    without = tied_lora.wrap(PARAMS, config).plan.adapted[0]
    for group in (with_sites, without):
        assert (group.rows, group.cols, group.is_table) == ((0,), (1,), True)


def test_small_model_needs_no_sites():
    assert adapted_keys(["up", "embed_tokens"], init(TiedLM())) == {TABLE, "up/kernel"}


def test_thousands_of_listed_names_are_looked_up_and_not_tried_one_by_one():
    layers = 4000
    params = {
        f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)} for i in range(layers)
    }
    names = list(params)
    sites = tied_lora.CallSites(
        tuple(
            tied_lora.CallSite(f"{name}/kernel", "dot_general", 0, name, "projection", (0,), (1,))
            for name in names
        )
    )
    config = tied_lora.LoraConfig(
        r=1, target_modules=names + [f"no_{name}" for name in names],
        exclude_modules=[f"other_{name}" for name in names],
        rank_pattern=dict.fromkeys(names, 2) | {"gone": 3},
    )  # fmt: skip
    start = time.process_time()
    with pytest.warns(tied_lora.UnmatchedTargetWarning) as caught:
        plan = tied_lora.wrap(params, config, sites=sites).plan
    assert time.process_time() - start < 10  # by trying each: minutes
    assert len(plan.adapted) == layers
    assert {a.rank for _, a in plan.adapters()} == {2}
    texts = [str(w.message) for w in caught]
    assert len(texts) == 21, "ten each of the names that mean nothing, and 'gone'"
    assert "So do 3990 more" in texts[9]
    assert "'gone' in rank_pattern" in texts[10]
    assert "So do 3990 more" in texts[20]
