"""Factors that start from the weight (PiSSA, OLoRA) or orthogonal, through `wrap`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora._tree.boxes import in_place
from tests.helpers.oracle import check, perturbed
from tests.helpers.small_models import LAYERS, TOKENS, StackedLM, TiedLM, init

TABLE, UP = "embed_tokens/embedding", "up/kernel"
RESIDUALS = ["pissa", "pissa_niter_8", "olora"]
ALL = [*RESIDUALS, "orthogonal"]
PARAMS = init(TiedLM())


def start(params, how, targets=("embed_tokens", "up"), **options):
    config = tied_lora.LoraConfig(
        r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=how
    )
    return tied_lora.wrap(params, config, **options)


def apply(params, tokens):
    return TiedLM().apply({"params": params}, tokens)


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
        ),
        found, expected,
    )  # fmt: skip


@pytest.mark.parametrize("how", ALL)
def test_merged_they_are_the_params(how):
    new = start(PARAMS, how)
    assert_close(tied_lora.merge(new), PARAMS)
    assert_close(tied_lora.adapt(apply)(new, TOKENS), apply(PARAMS, TOKENS), 1e-4)
    assert all(np.any(np.asarray(x)) for x in new.adapters["lora"][UP].values())
    # As in PEFT, a table starts as it does without.
    assert not np.any(new.adapters["lora"][TABLE]["lora_a"])
    assert new.params["embed_tokens"]["embedding"] is PARAMS["embed_tokens"]["embedding"]


@pytest.mark.parametrize("how", RESIDUALS)
def test_what_is_frozen_is_the_residual(how):
    new = start(PARAMS, how)
    pair = new.adapters["lora"][UP]
    delta = 1.5 * np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])
    want = np.asarray(PARAMS["up"]["kernel"]) - delta
    np.testing.assert_allclose(new.params["up"]["kernel"], want, rtol=1e-5, atol=1e-5)
    assert np.abs(delta).max() > 0.1
    assert new.params["up"]["bias"] is PARAMS["up"]["bias"]


def test_pissa_takes_the_largest_singular_values():
    new = start(PARAMS, "pissa", ["up"])
    whole = np.linalg.svd(np.asarray(PARAMS["up"]["kernel"]), compute_uv=False)
    rest = np.linalg.svd(np.asarray(new.params["up"]["kernel"]), compute_uv=False)
    np.testing.assert_allclose(rest, [*whole[2:], 0, 0], rtol=1e-4, atol=1e-5)


def test_orthogonal_leaves_the_params_alone():
    new = start(PARAMS, "orthogonal")
    jax.tree.map(np.testing.assert_array_equal, tied_lora.base(new), PARAMS)
    assert new.params["up"]["kernel"] is PARAMS["up"]["kernel"]


@pytest.mark.parametrize("how", RESIDUALS)
def test_base_refuses(how):
    with pytest.raises(ValueError, match=f"base: init_lora_weights='{how}' took .*'{UP}'.*keep"):
        tied_lora.base(start(PARAMS, how))


@pytest.mark.parametrize("how", ALL)
def test_trained_they_are_what_merge_says(how):
    assert {r.served for r in check(apply, perturbed(start(PARAMS, how)), TOKENS).reads} == {
        "low rank"
    }


@pytest.mark.parametrize("how", ALL)
def test_bfloat16(how):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    new = start(params, how)
    assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(new.adapters)} == {jnp.dtype(jnp.float32)}
    assert_close(tied_lora.merge(new), params, 2e-2)
    check(apply_plain, new, jnp.asarray(TOKENS))


def apply_plain(params, tokens):
    w = params["embed_tokens"]["embedding"]
    return jnp.tanh(w[tokens] @ params["up"]["kernel"]) @ w.T


@pytest.mark.parametrize("how", ALL)
def test_tied_members_share_them(how):
    w = PARAMS["up"]["kernel"]
    params = {**PARAMS, "down": {"kernel": w.T}, "again": {"kernel": w}}
    new = start(params, how, ["down"], ties=[("down/kernel", "up/kernel", "transposed")])
    assert len(new.adapters["lora"]) == 1
    merged = tied_lora.merge(new)
    assert_close(merged, params)
    np.testing.assert_array_equal(merged["down"]["kernel"], merged["up"]["kernel"].T)
    assert merged["again"]["kernel"] is merged["up"]["kernel"]


@pytest.mark.parametrize("how", ALL)
def test_stacked_layers_and_head_axes(how):
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(lambda p, t: model.apply({"params": p}, t), params, TOKENS)
    new = start(params, how, ["q_proj", "o_proj"], sites=sites)
    assert_close(tied_lora.merge(new), params)
    for name, rows in (("q_proj", 1), ("o_proj", 2)):
        key = f"layers/layer/{name}/kernel"
        pair = new.adapters["lora"][key]
        whole = np.asarray(params["layers"]["layer"][name]["kernel"])
        assert pair["lora_a"].shape == (*whole.shape[: rows + 1], 2)
        assert not np.allclose(pair["lora_a"][0], pair["lora_a"][1])
        if how != "pissa":
            continue
        for layer in range(LAYERS):
            matrix = whole[layer].reshape(np.prod(whole.shape[1 : rows + 1]), -1)
            frozen = np.asarray(new.params["layers"]["layer"][name]["kernel"][layer])
            rest = np.linalg.svd(frozen.reshape(matrix.shape), compute_uv=False)
            want = np.linalg.svd(matrix, compute_uv=False)[2:]
            np.testing.assert_allclose(rest[:-2], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ALL)
def test_abstract_params(how):
    shapes = jax.eval_shape(lambda: PARAMS)
    new = start(shapes, how)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(new))
    concrete = start(PARAMS, how)
    assert new.plan is concrete.plan
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new.adapters) == jax.tree.map(
        lambda x: (x.shape, x.dtype), concrete.adapters
    )


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_leaves(how, kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    place = jax.NamedSharding(mesh, jax.P("x", None))
    params = {"up": {"kernel": jax.device_put(PARAMS["up"]["kernel"], place)}}
    new = start(params, how, ["up"])
    pair = new.adapters["lora"][UP]
    assert new.params["up"]["kernel"].sharding == place
    assert pair["lora_a"].sharding.is_equivalent_to(place, 2)
    assert pair["lora_b"].sharding.is_fully_replicated
    assert_close(jax.device_get(tied_lora.merge(new)), {"up": {"kernel": PARAMS["up"]["kernel"]}})
    alone = start({"up": {"kernel": PARAMS["up"]["kernel"]}}, how, ["up"])
    if how != "pissa_niter_8":
        assert_close(jax.device_get(new), jax.device_get(alone), 1e-4)


@pytest.mark.parametrize("how", ALL)
def test_under_jit(how):
    traced = jax.jit(lambda p: start(p, how))(PARAMS)
    assert_close(tied_lora.merge(traced), PARAMS)


def test_an_odd_rank_is_not_orthogonal():
    with pytest.raises(ValueError, match=r"r=3 with init_lora_weights='orthogonal'; .*even"):
        tied_lora.LoraConfig(r=3, target_modules=["up"], init_lora_weights="orthogonal")


# Checkpoints


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_checkpoint_goes_onto_the_residual(tmp_path, how):
    trained = perturbed(start(PARAMS, how))
    checkpoint.save(tmp_path / "a", trained)
    restored = checkpoint.restore(tmp_path / "a", start(PARAMS, how).params).adapted
    assert restored.plan is trained.plan
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    assert_close(tied_lora.merge(restored), tied_lora.merge(trained))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_checkpoint_does_not_go_onto_the_base_as_it_was(tmp_path, how):
    checkpoint.save(tmp_path / "a", start(PARAMS, how))
    message = rf"init_lora_weights='{how}' .*residual.*wrap\(params, config\)\.params"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.restore(tmp_path / "a", PARAMS)


def test_an_orthogonal_checkpoint_goes_onto_the_base(tmp_path):
    trained = perturbed(start(PARAMS, "orthogonal"))
    checkpoint.save(tmp_path / "a", trained)
    restored = checkpoint.restore(tmp_path / "a", PARAMS).adapted
    jax.tree.map(np.testing.assert_array_equal, restored, trained)


def test_a_traced_array_is_not_asked_for_a_place():
    """JAX looks through the whole trace to say that there is none: of each gradient."""

    class Asked:
        @property
        def sharding(self):
            raise AssertionError("asked")

    assert jax.jit(lambda x: in_place(Asked(), x))(1.0) == 1.0
