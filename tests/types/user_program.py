"""What a user writes, with every public function: it runs, and a strict type checker accepts it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic, checkpoint, losses, names, peft, serving, train

Params = dict[str, dict[str, jax.Array]]


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(32, 16, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens) @ self.embed.embedding[...].T


class Variable(NamedTuple):
    path: str
    value: jax.Array


class Model:
    def __call__(self, tokens: jax.Array, params: Any = None) -> jax.Array:
        return apply(params, tokens)


def apply(params: Params, tokens: jax.Array, scale: float = 1.0) -> jax.Array:
    hidden = jnp.tanh(params["embed"]["embedding"][tokens] @ params["up"]["kernel"])
    return scale * hidden @ params["embed"]["embedding"].T


def loss_fn(params: Params, tokens: jax.Array, *, z_loss: float = 0.0) -> jax.Array:
    table = params["embed"]["embedding"]
    return losses.linear_cross_entropy(
        table[tokens] @ params["up"]["kernel"], table, tokens, z_loss=z_loss
    )


def functional(tokens: jax.Array, folder: Path) -> jax.Array:
    key = jax.random.key(0)
    params: Params = {
        "embed": {"embedding": jax.random.normal(key, (32, 16))},
        "up": {"kernel": jax.random.normal(key, (16, 16))},
    }
    config = tied_lora.LoraConfig(
        r=4, target_modules=["embed", "up"], rank_pattern={"up": 2}, ensure_weight_tying=True
    )
    sites: tied_lora.CallSites = tied_lora.trace(apply, params, tokens)
    ties: list[tied_lora.TieGroup] = tied_lora.find_ties(params, sites=sites)
    adapted: tied_lora.Adapted[Params] = tied_lora.wrap(params, config, sites=sites, ties=ties)
    tied_lora.explain(apply, adapted, tokens).assert_tied()

    optimizer = train.lora_plus(adapted, 1e-3)
    state = optimizer.init(adapted.adapters)
    step = tied_lora.value_and_grad(tied_lora.adapt(loss_fn, on_dense="error"))
    loss, grads = step(adapted.train(key), tokens, z_loss=1e-4)
    updates, state = optimizer.update(grads, state, adapted.adapters)
    trained = adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates))
    training = train.step(tied_lora.adapt(loss_fn), optimizer, donate=False)
    adapters, frozen = tied_lora.split(trained)
    trained = tied_lora.combine(adapters, frozen).train(key)
    trained, state, loss = training(trained, state, tokens)
    kinds = train.labels(trained), train.labels_by(trained, {"up": 1e-4}, default=1e-5)

    checkpoint.save(folder / "adapter", trained, opt_state=state, step=1)
    back: checkpoint.Restored[Params] = checkpoint.restore(folder / "adapter", params)
    with checkpoint.Manager(str(folder / "run"), max_to_keep=2) as manager:
        manager.save(1, back.adapted)
        manager.restore(params, check_base=False)
        latest: int | None = manager.latest_step()
        manager.restore(params, step="best" if latest is None else latest)
    merged: Params = tied_lora.merge(trained, dtype=jnp.float32)
    checkpoint.save_params(folder / "merged", merged, ties=trained.plan)
    merged = checkpoint.restore_params(folder / "merged")

    lines = [("embed/embedding", "embed_tokens.weight"), ("up/kernel", "up.weight")]
    table = names.names_of(None, lines, tied={"embed/embedding": ("lm_head",)})
    same: names.Names = names.names_of_leaves(merged)
    merged = names.from_state_dict(names.to_state_dict(merged, table), merged, table)
    entries: list[names.Entry] = names.state_entries(merged, table)
    weight = table.to_torch("up/kernel", 2)[0]
    kernel: np.ndarray = names.to_torch_array(merged["up"]["kernel"], weight)
    kernel = names.from_torch_array(kernel, weight, (16, 16))
    kernel = names.from_torch_arrays([kernel], [weight], (16, 16))
    variables = [Variable("up/kernel", merged["up"]["kernel"])]
    listed: list[jax.Array] = names.in_order(variables, names.by_path(variables))
    assert len(listed) == 1
    peft.save_adapter(folder / "peft", trained, table, save_embedding_layers=False, for_="peft")
    loaded = peft.load_adapter(folder / "peft", params, table, tied_copies="same")
    peft.save_merged(folder / "torch", trained, table, {"model_type": "own"}, dtype=jnp.bfloat16)

    both = arithmetic.combine([trained, loaded], [0.5, 0.5], how="cat")
    both = arithmetic.switch(arithmetic.padded(both, 8), arithmetic.scale(trained, 2.0))
    both = arithmetic.plain(both, params)
    found: arithmetic.Extraction = arithmetic.extract(params, merged, config, sites=sites)
    stacked = serving.put(serving.stack([trained, loaded], capacity=3), 2, found.adapted)
    served = tied_lora.adapt(apply)
    logits = tied_lora.per_example(served)(serving.select(stacked, [0, 2]), tokens, scale=2.0)
    jax.vmap(served, in_axes=(serving.adapter_axes(stacked), None))(stacked, tokens)
    model = tied_lora.AdaptedModel(Model(), trained)
    small = tied_lora.wrap(tied_lora.quantize(tied_lora.base(trained), "int8"), config, sites=sites)
    plain = tied_lora.dequantize(small)
    plain, vocabulary = tied_lora.grow_vocabulary(plain, 40, pad_to_multiple_of=8)
    assert tied_lora.stored_bytes(plain) > tied_lora.stored_bytes(small)
    print(kinds, same, len(entries), both, vocabulary.size)
    return logits + model(tokens) + loss


def module_loss(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens).sum()


def modules(tokens: jax.Array) -> jax.Array:
    config = tied_lora.LoraConfig(r=4, target_modules=["embed"], init_lora_weights="gaussian")
    module = Tied(nnx.Rngs(0))
    sites = tied_lora.nnx.trace(module, tokens)
    lora = tied_lora.nnx.wrap(tied_lora.nnx.quantize(module, "int8"), config, sites=sites)
    tied_lora.nnx.explain(lora, tokens).assert_tied()
    training = tied_lora.nnx.step(module_loss)
    training(lora, nnx.Optimizer(lora, optax.adam(1e-3), wrt=nnx.LoRAParam), tokens)
    again = tied_lora.nnx.from_adapted(module, tied_lora.nnx.adapted(lora))
    print(tied_lora.nnx.params(again).keys(), tied_lora.nnx.base(lora))
    return tied_lora.nnx.merge(lora)(tokens)


@tied_lora.register_rule("a primitive of one's own")
def serve(context: tied_lora.RuleContext, equation: Any, table: Any) -> Any:
    return NotImplemented


own_loss = tied_lora.custom_rule(loss_fn, serve)
library_loss = tied_lora.custom_rule(loss_fn, losses.blockwise_cross_entropy_rule)
