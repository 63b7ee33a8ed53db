"""trace: every leaf's call sites, on shapes alone; and which arguments are taken for params."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, StackedLM, TiedLM, init

IDS = np.array([0, 3, 1], np.int32)
TABLE = jnp.ones((5, 4))


def short(sites):
    """Returns (leaf, operation, role, rows, cols, batch) of each site."""
    return [(s.leaf, f"{s.operation}#{s.ordinal}", s.role, s.rows, s.cols, s.batch) for s in sites]


TIED = [
    ("embed_tokens/embedding", "gather#0", "lookup", (0,), (1,), ()),
    ("up/kernel", "dot_general#0", "projection", (0,), (1,), ()),
    ("up/bias", "add#0", "other", (), (), ()),
    ("embed_tokens/embedding", "dot_general#0", "projection", (1,), (0,), ()),
]


def test_embed_dense_and_attend():
    model = TiedLM()
    sites = tied_lora.trace(model.apply, {"params": init(model)}, TOKENS)
    assert short(sites) == TIED
    scopes = ["embed_tokens", "up", "up", "embed_tokens.attend"]
    assert [s.scope for s in sites] == [f"TiedLM/{s}" for s in scopes]


def test_attention_kernels_in_stacked_layers():
    model = StackedLM()
    sites = tied_lora.trace(model.apply, {"params": init(model)}, TOKENS)
    layer = "layers/layer"
    assert [s for s in short(sites) if s[2] != "other"] == [
        ("embed_tokens/embedding", "gather#0", "lookup", (0,), (1,), ()),
        (f"{layer}/q_proj/kernel", "dot_general#0", "projection", (1,), (2, 3), (0,)),
        (f"{layer}/o_proj/kernel", "dot_general#0", "projection", (1, 2), (3,), (0,)),
        ("lm_head/kernel", "dot_general#0", "projection", (0,), (1,), ()),
    ]
    assert sites.of(f"{layer}/q_proj/kernel")[0].scope == "StackedLM/layers/layer/q_proj"


def test_shapes_alone_give_the_same():
    model = TiedLM()
    params = init(model)
    shapes = jax.eval_shape(lambda: params)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    on_shapes = tied_lora.trace(model.apply, {"params": shapes}, tokens)
    assert on_shapes == tied_lora.trace(model.apply, {"params": params}, TOKENS)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.remat(f))])
def test_under_transformations_of_the_whole(transform):
    model = TiedLM()
    fn = transform(lambda params, tokens: model.apply({"params": params}, tokens))
    sites = tied_lora.trace(fn, init(model), TOKENS)
    assert short(sites) == TIED


def test_under_vmap_over_the_data():
    fn = jax.vmap(lambda p, ids: p["t"][ids] @ p["t"].T, in_axes=(None, 0))
    assert short(tied_lora.trace(fn, {"t": TABLE}, jnp.stack([IDS, IDS]))) == [
        ("t", "gather#0", "lookup", (0,), (1,), ()),
        ("t", "dot_general#0", "projection", (1,), (0,), ()),
    ]


def test_under_grad_the_backward_pass_reads_too():
    model = TiedLM()
    loss = jax.grad(lambda params: model.apply({"params": params}, TOKENS).sum())
    sites = tied_lora.trace(loss, init(model))
    assert short(sites)[:4] == TIED
    backward = sites.of("embed_tokens/embedding")[2:]
    assert [(s.operation, s.ordinal, s.rows, s.cols) for s in backward] == [
        ("dot_general", 1, (0,), (1,))
    ]
    assert {s.scope for s in sites} == {
        f"TiedLM/{s}" for s in ("embed_tokens", "up", "embed_tokens.attend")
    }


def test_remat_and_scan_of_linen_modules():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(4, name="up")(x)

    x = jnp.ones((2, 3))
    sites = tied_lora.trace(Model().apply, {"params": init(Model(), x)}, x)
    assert short(sites)[0] == ("up/kernel", "dot_general#0", "projection", (0,), (1,), ())


def test_one_hot_product_is_a_lookup():
    sites = tied_lora.trace(lambda p: jax.nn.one_hot(IDS, 5) @ p["t"], {"t": TABLE})
    assert short(sites) == [("t", "dot_general#0", "lookup", (0,), (1,), ())]


def test_what_is_neither_is_other():
    sites = tied_lora.trace(lambda p: jnp.sin(p["t"]) + p["t"].max(), {"t": TABLE})
    assert short(sites) == [
        ("t", "sin#0", "other", (), (), ()),
        ("t", "reduce_max#0", "other", (), (), ()),
    ]


def test_what_picks_entries_and_keeps_no_axis_is_other():
    ids = jnp.zeros((3, 4), int)
    sites = tied_lora.trace(lambda p: jnp.take_along_axis(p["t"], ids, axis=0), {"t": TABLE})
    assert short(sites) == [("t", "gather#0", "other", (), (), ())]


def test_transposed_table_is_named_in_the_leafs_own_axes():
    sites = tied_lora.trace(lambda p: jnp.ones((2, 4)) @ p["t"].T[:, :3], {"t": TABLE})
    assert short(sites) == [("t", "dot_general#0", "projection", (1,), (0,), ())]


def test_traces_unite_and_round_trip():
    model = TiedLM()
    params = init(model)
    forward = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    other = tied_lora.trace(lambda p: p["up"]["kernel"].T @ jnp.ones(8), params)
    both = forward | other | forward
    assert len(both) == len(forward) + 1
    assert tied_lora.CallSites.from_json(both.to_json()) == both
    assert hash(forward) == hash(tied_lora.trace(model.apply, {"params": params}, TOKENS))


W = {"w": jnp.ones((4, 4))}


def use(*args, **kwargs):
    """Multiplies every float matrix among the arguments."""
    leaves = [x for x in jax.tree.leaves((args, kwargs)) if jnp.ndim(x) == 2]
    return [x.astype(jnp.float32) @ jnp.ones(x.shape[1]) for x in leaves]


KEY = jax.random.split(jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("args", "kwargs", "leaves"),
    [
        ([{"params": W}], {}, ["w"]),
        ([{"params": W, "batch_stats": {"m": jnp.ones((4, 4))}}], {}, ["w"]),
        ([], {"params": W}, ["w"]),
        ([], {"params": {"params": W}}, ["w"]),
        ([], {"variables": {"params": W}}, ["w"]),
        ([W], {}, ["w"]),
        ([W, {"other": jnp.ones(())}], {}, ["w"]),
        ([jnp.ones((4, 4)), W], {}, ["w"]),
        ([{"ids": jnp.ones((4, 4), jnp.int32)}, W], {}, ["w"]),
        ([{"w": jnp.ones((4, 4)), "n": jnp.ones((4, 4), jnp.int32)}], {}, ["w"]),
        ([W, KEY], {}, ["w"]),
        ([[jnp.ones((4, 4)), jnp.ones((4, 4))]], {}, ["0", "1"]),
        ([{"params": {"w": np.ones((4, 4), np.float32)}}], {}, ["w"]),
    ],
)
def test_which_argument_is_params(args, kwargs, leaves):
    assert list(tied_lora.trace(use, *args, **kwargs).leaves()) == leaves


OTHER = {"mask": jnp.ones((4, 4))}


def test_the_argument_called_params_is():
    def loss(batch, params):
        return jnp.sum(batch["mask"] @ params["w"])

    for sites in (
        tied_lora.trace(loss, OTHER, W),
        tied_lora.trace(loss, OTHER, params=W),
        tied_lora.trace(lambda params, batch: loss(batch, params), W, OTHER),
    ):
        assert list(sites.leaves()) == ["w"]


@pytest.mark.parametrize("args", [[W, OTHER], [OTHER, W]])
def test_where_two_arguments_could_be_params_it_asks(args):
    with pytest.raises(ValueError, match="argument 0 and argument 1 have floating-point arrays"):
        tied_lora.trace(use, *args)
    with pytest.raises(ValueError, match="argument 0 and argument other have"):
        tied_lora.trace(use, args[0], other=args[1])


def test_sites_of_other_params_are_refused():
    sites = tied_lora.trace(use, OTHER)
    config = tied_lora.LoraConfig(r=1, target_modules=["w"])
    with pytest.raises(ValueError, match="sites given read 'mask', which is no leaf of params;"):
        tied_lora.wrap(W, config, sites=sites)


def test_no_params():
    with pytest.raises(
        ValueError, match=r"trace: found no params .*expected a 'params' collection"
    ):
        tied_lora.trace(use, jnp.ones((4, 4)))


def test_branching_on_arguments_that_are_no_params():
    def fn(params, mask, mode, rng):
        assert isinstance(mask, np.ndarray)
        x = jax.random.normal(rng, (2, 5 if mask.any() and mode == "all" else 4))
        return x @ (params["w"] if x.shape[1] == 4 else jnp.ones((5, 5)))

    params = {"w": jnp.ones((4, 4))}
    assert len(tied_lora.trace(fn, params, np.array([False]), "all", jax.random.key(0))) == 1
    assert len(tied_lora.trace(fn, params, np.array([True]), "all", jax.random.key(0))) == 0


def test_nothing_is_computed():
    shape = jax.ShapeDtypeStruct((VOCAB * 10**6, WIDTH), jnp.float32)  # 384 MB if it were made
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    embed = nn.Embed(*shape.shape)
    sites = tied_lora.trace(embed.apply, {"params": {"embedding": shape}}, tokens)
    assert short(sites) == [("embedding", "gather#0", "lookup", (0,), (1,), ())]
