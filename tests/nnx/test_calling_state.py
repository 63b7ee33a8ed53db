"""State that a call changes, and NNX's transformations around and inside an adapted module."""

from __future__ import annotations

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import (
    TOKENS,
    VOCAB,
    WIDTH,
    SharedVariable,
    Stacked,
    Stateful,
    wrapped,
)

X = jnp.ones((2, WIDTH))


@functools.cache
def adapted() -> tied_lora.nnx.AdaptedModule:
    """An adapted module that no test changes."""
    return wrapped(SharedVariable(nnx.Rngs(0)), ["lm_head", "up"])


@functools.cache
def expected():
    return adapted()(TOKENS)


def subclass(call):
    """Returns an adapted `SharedVariable` with another ``__call__``."""
    kind = type("Special", (SharedVariable,), {"__call__": call})
    return wrapped(kind(nnx.Rngs(0)), ["lm_head", "up"])


def close(found, wanted, tolerance=2e-5):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@nnx.jit
def run(model, *args):
    return model(*args)


class TestState:
    """State moves in an adapted module as it does in the merged one."""

    @pytest.mark.parametrize(
        ("kind", "mode"),
        [
            (Stateful, "train"),
            (Stateful, "eval"),
            (functools.partial(Stacked, remat=True), "train"),
        ],
    )
    def test_dropout_and_running_statistics(self, kind, mode):
        module = kind(nnx.Rngs(0))
        sites = tied_lora.nnx.trace(module, TOKENS)
        model = wrapped(module, ["embed_tokens", "lin"], sites=sites)
        plain = tied_lora.nnx.merge(model)
        getattr(model, mode)()
        getattr(plain, mode)()
        counts = nnx.Any(nnx.RngCount, nnx.BatchStat)
        before = jax.tree.leaves(nnx.state(model.module, counts))
        for _ in range(2):
            close(run(model, TOKENS), run(plain, TOKENS))
        after = nnx.state(model.module, nnx.Not(nnx.Param))
        close(after, nnx.state(plain, nnx.Not(nnx.Param)))
        after = jax.tree.leaves(nnx.state(after, counts))
        assert all(np.any(a != b) for a, b in zip(after, before, strict=True)) == (mode == "train")

    def test_without_jit(self):
        model = wrapped(Stateful(nnx.Rngs(0)), ["lin"])
        plain = tied_lora.nnx.merge(model)
        layer, merged = model.layers[0], plain.layers[0]
        close(layer(X), merged(X))
        assert layer.dropout.rngs.count[...] == 1
        close(nnx.state(model.module.layers[0].norm), nnx.state(merged.norm))

    def test_rngs_among_the_arguments(self):
        def call(self, tokens, rngs):
            noise = jax.random.normal(rngs.noise(), (2, 4, 12))
            return SharedVariable.__call__(self, tokens) + noise

        model, plain_rngs, rngs = subclass(call), nnx.Rngs(noise=3), nnx.Rngs(noise=3)
        plain = tied_lora.nnx.merge(model)
        for _ in range(2):
            close(run(model, TOKENS, rngs), run(plain, TOKENS, plain_rngs))
        assert rngs.noise.count[...] == 2

    def test_static_fields_and_new_variables(self):
        def call(self, tokens):
            self.calls = getattr(self, "calls", 0) + 1
            self.last = nnx.Cache(tokens)
            return SharedVariable.__call__(self, tokens)

        model = subclass(call)
        kernel = model.module.up.kernel
        for _ in range(2):
            model(TOKENS)
        assert model.calls == 2
        np.testing.assert_array_equal(model.module.last[...], TOKENS)
        assert model.module.up.kernel is kernel

    def test_capture(self):
        def call(self, tokens):
            x = self.encode(tokens)
            self.sow(nnx.Intermediate, "hidden", x)
            return self.lm_head(x)

        model = subclass(call)
        plain = tied_lora.nnx.merge(model)
        _, wanted = nnx.capture(plain, nnx.Intermediate)(TOKENS)
        _, found = nnx.capture(model, nnx.Intermediate)(TOKENS)
        _, jitted = nnx.jit(nnx.capture(lambda m, t: m(t), nnx.Intermediate))(model, TOKENS)
        close(found, wanted)
        close(jitted, wanted)
        with pytest.warns(DeprecationWarning, match="sow"):
            model(TOKENS)
        close(nnx.pop(model, nnx.Intermediate), wanted)

    def test_decoding_with_a_cache(self):
        """Attention's kernels have three axes; its cache is written step by step."""

        class Decoder(nnx.Module):
            def __init__(self, rngs):
                self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
                self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)

            def __call__(self, tokens, decode=False):
                mask = None if decode else nnx.make_causal_mask(jnp.asarray(tokens))
                x = self.attention(self.embed_tokens(tokens), mask=mask, decode=decode)
                return self.embed_tokens.attend(x)

        module = Decoder(nnx.Rngs(0))
        sites = tied_lora.nnx.trace(module, TOKENS)
        model = wrapped(module, ["embed_tokens", "query", "value", "out"], sites=sites)
        whole = run(tied_lora.nnx.merge(model), TOKENS)
        model.attention.init_cache((2, 4, WIDTH))
        step = nnx.jit(lambda model, tokens: model(tokens, decode=True))
        steps = [step(model, TOKENS[:, i : i + 1]) for i in range(4)]
        close(jnp.concatenate(steps, axis=1), whole, 1e-4)
        assert model.attention.cache_index[...] == 4

    def test_a_call_that_assigns_to_a_weight(self):
        def call(self, tokens):
            self.up.kernel[...] *= 2.0
            return SharedVariable.__call__(self, tokens)

        model = subclass(call)
        kernel = model.module.up.kernel.get_value()
        with pytest.raises(ValueError, match=r"assigns to 'up/kernel', which is adapted.*frozen"):
            model(TOKENS)
        assert model.module.up.kernel.get_value() is kernel
        other = wrapped(type(model.module)(nnx.Rngs(0)), ["lm_head"])
        other(TOKENS)
        close(other.module.up.kernel[...], 2 * kernel)

    def test_copies_and_swaps(self):
        """A copy of a weight is the weight with its delta; what changes places is written."""

        def call(self, tokens):
            self.copy[...] = self.up.kernel[...]
            first, second = self.first.get_value(), self.second.get_value()
            self.first.set_value(second)
            self.second.set_value(first)
            return SharedVariable.__call__(self, tokens)

        model = subclass(call)
        model.copy = nnx.Variable(jnp.zeros((WIDTH, WIDTH)))
        model.first, model.second = nnx.Variable(jnp.zeros(2)), nnx.Variable(jnp.ones(2))
        with pytest.warns(tied_lora.DensifyWarning, match="'up/kernel' is handed back"):
            run(model, TOKENS)
        close(model.copy[...], tied_lora.nnx.merge(model).up.kernel[...])
        close((model.first[...], model.second[...]), (jnp.ones(2), jnp.zeros(2)))

    def test_what_is_handed_back(self):
        def call(self, tokens):
            return self.lm_head.embedding, nnx.state(self), self, self.up, "text", None

        model = subclass(call)
        with pytest.warns(tied_lora.UnreadTargetWarning):
            table, state, same, up, text, nothing = model(TOKENS)
        assert table.get_value() is model.module.embed_tokens.embedding.get_value()
        assert isinstance(table, nnx.Param)
        assert state.up.kernel.get_value() is model.module.up.kernel.get_value()
        assert (same, up, text, nothing) == (model, model.module.up, "text", None)


class TestInside:
    """Transformations in the module's own code."""

    def both(self, call):
        model = subclass(call)
        plain = tied_lora.nnx.merge(model)
        close(run(model, TOKENS), run(plain, TOKENS))
        assert not any(r.served == "dense" for r in tied_lora.nnx.explain(model, TOKENS).reads)

    def test_jit(self):
        self.both(lambda self, tokens: nnx.jit(SharedVariable.__call__)(self, tokens))

    def test_cond(self):
        def call(self, tokens):
            return nnx.cond(
                jnp.sum(tokens) > 3,
                lambda m, t: SharedVariable.__call__(m, t),
                lambda m, t: 2.0 * m.lm_head(m.embed_tokens(t)),
                self, tokens,
            )  # fmt: skip

        self.both(call)

    def test_grad(self):
        biases = nnx.DiffState(0, nnx.PathContains("bias"))

        def call(self, tokens):
            return nnx.grad(lambda m, t: jnp.sum(SharedVariable.__call__(m, t)), argnums=biases)(
                self, tokens
            )

        self.both(call)


class TestAround:
    """Transformations of functions that an adapted module is given to."""

    def test_split_merge_clone_copy(self):
        model = adapted()
        graphdef, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
        assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(model)))
        merge = jax.jit(lambda factors, rest: nnx.merge(graphdef, factors, rest)(TOKENS))
        close(merge(factors, rest), expected())
        for other in (nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.plan is model.plan or other.plan.to_json() == model.plan.to_json()
            close(run(other, TOKENS), expected())

    def test_closed_over(self):
        """A call that changes nothing is fine where NNX lets nothing be changed."""
        model = adapted()
        close(jax.jit(lambda tokens: model(tokens))(TOKENS), expected())
        close(jax.vmap(model.up)(X), model.up(X))
        assert jax.grad(lambda x: jnp.sum(model.up(x)))(X).shape == X.shape

    def test_vmap(self):
        model = nnx.clone(adapted())
        over_data = nnx.vmap(lambda m, t: m(t), in_axes=(None, 0))
        close(over_data(model, TOKENS), expected())
        factors = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), factors))
        axes = nnx.StateAxes({nnx.LoRAParam: 0, ...: None})
        stacked = nnx.vmap(lambda m, t: m(t), in_axes=(axes, None))(model, TOKENS)
        close(stacked[1], expected())
        close(stacked[0], run(model.module, TOKENS))

    def test_scan_and_remat(self):
        model = wrapped(Stateful(nnx.Rngs(0)), ["embed_tokens", "lin"])
        one, two = nnx.clone(model), nnx.clone(model)
        walk = nnx.scan(lambda m, t: (m, m(t)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        _, found = walk(one, jnp.stack([TOKENS, TOKENS]))
        remat = nnx.jit(nnx.remat(lambda m, t: m(t)))
        wanted = [remat(two, TOKENS), remat(two, TOKENS)]
        close(found, jnp.stack(wanted))
        close(nnx.state(one), nnx.state(two))

    def test_wrapped_inside_of_jit(self):
        @nnx.jit
        def make():
            config = tied_lora.LoraConfig(r=2, target_modules=["lm_head"])
            return tied_lora.nnx.wrap(SharedVariable(nnx.Rngs(0)), config)

        model = make()
        assert len(model.plan.groups[0].members) == 2
        tied_lora.nnx.explain(model, TOKENS).assert_tied()
