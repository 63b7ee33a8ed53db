"""LoRA on a small Linen model whose output layer is its embedding: one delta for both uses."""

import argparse
import signal
import sys

if __name__ == "__main__":

    def stop(*_):  # Ctrl-C
        sys.stderr.write("\nInterrupted; nothing is kept: the same command begins anew.\n")
        sys.exit(130)

    signal.signal(signal.SIGINT, stop)
    argparse.ArgumentParser(description=__doc__).parse_args()

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flax_tied_lora as tied_lora


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 32, name="embed")
        hidden = nn.relu(nn.Dense(32, name="dense")(embed(tokens)))  # read to look tokens up ...
        return embed.attend(hidden)  # ... and read again to compute the logits


model, tokens = Model(), jnp.arange(48).reshape(4, 12) % 7
params = model.init(jax.random.key(0), tokens)["params"]

config = tied_lora.LoraConfig(r=4, lora_alpha=8, target_modules=["embed", "dense"])
sites = tied_lora.trace(model.apply, {"params": params}, tokens)
adapted = tied_lora.wrap(params, config, sites=sites)
print(adapted, "\n")

explanation = tied_lora.explain(model.apply, {"params": adapted}, tokens)
explanation.assert_tied()
print(explanation, "\n")

apply = tied_lora.adapt(model.apply)  # takes `adapted` where model.apply took params


def loss_fn(adapted, tokens):
    logits = apply({"params": adapted}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


optimizer = optax.adam(0.003)
state = optimizer.init(adapted.adapters)  # the frozen params have no optimizer state
step = tied_lora.train.step(loss_fn, optimizer)  # compiled; the params go in and never come out

for number in range(101):
    adapted, state, loss = step(adapted, state, tokens)
    if number % 25 == 0:
        print(f"step {number:3}: loss {loss:.3f}")

merged = tied_lora.merge(adapted)  # plain params again, for the plain model
logits = model.apply({"params": merged}, tokens)
difference = jnp.abs(logits - apply({"params": adapted}, tokens)).max() / jnp.abs(logits).max()
print(f"\nmerged: the plain model gives the same logits, to {difference:.0e} of their size")
