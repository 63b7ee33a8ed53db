"""Eight adapters in one batch: trained side by side, served by slot, switched while it runs."""

import functools
import time

import program

if __name__ == "__main__":
    program.start(__doc__)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_tied_lora as tied_lora

VOCABULARY, WIDTH, LENGTH, ADAPTERS = 24, 48, 12, 8


class Model(nn.Module):
    """A small causal model whose output layer is its embedding, with Flax's own cache."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(4, decode=self.decode, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x)))
        return embed.attend(nn.LayerNorm()(x))


model, decoder = Model(), Model(decode=True)
blank = jnp.zeros((ADAPTERS, LENGTH), jnp.int32)
params = jax.jit(model.init)(jax.random.key(0), blank)["params"]
cache = jax.jit(decoder.init)(jax.random.key(0), blank)["cache"]

# Adapter number i learns to count in steps of i + 1: all of them at once, over one frozen base.
config = tied_lora.LoraConfig(r=8, lora_alpha=16, target_modules=["embed", "up", "down"])
fresh = [tied_lora.wrap(params, config, rng=jax.random.key(i)) for i in range(ADAPTERS)]
counting = tied_lora.stack(fresh)
texts = np.arange(LENGTH) * np.arange(1, ADAPTERS + 1)[:, None]  # [adapters, length]
texts = (texts[:, None] + np.arange(VOCABULARY)[:, None]) % VOCABULARY  # [adapters, texts, length]
optimizer = optax.adam(0.01)


def loss_fn(adapted, tokens):
    logits = tied_lora.adapt(model.apply)({"params": adapted}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def losses_of(counting, texts):
    axes = (tied_lora.adapter_axes(counting), 0)
    losses = jax.vmap(loss_fn, in_axes=axes)(counting, texts)
    return losses.sum(), losses  # of the sum, each adapter has the gradient of its own loss


train = tied_lora.train.step(losses_of, optimizer, has_aux=True)
state = optimizer.init(counting.adapters)
for _ in range(60):
    counting, state, (_, losses) = train(counting, state, texts)
print(f"trained {ADAPTERS} adapters: losses {losses.min():.3f} to {losses.max():.3f}")
adapters = [
    fresh[i].replace(adapters=jax.tree.map(lambda x, i=i: x[i], counting.adapters))
    for i in range(ADAPTERS)
]

# Serving: some slots to begin with, one compiled step, which is traced once.
traces = 0


def next_tokens(variables, tokens):
    global traces
    traces += 1
    logits, new = decoder.apply(variables, tokens, mutable=["cache"])
    return jnp.argmax(logits, axis=-1), new["cache"]


@functools.partial(jax.jit, donate_argnums=1)  # the cache is written in place
def step(selected, cache, tokens):
    run = tied_lora.per_example(tied_lora.adapt(next_tokens))
    return run({"params": selected, "cache": cache}, tokens)


def continued(selected, tokens, length=7):
    own, found = jax.tree.map(jnp.copy, cache), []
    for _ in range(length):
        tokens, own = step(selected, own, tokens)
        found.append(tokens)
    return np.concatenate(found, axis=1)


served = tied_lora.stack(adapters[:4], capacity=ADAPTERS)
start = jnp.arange(ADAPTERS)[:, None]
before = continued(tied_lora.select(served, np.arange(ADAPTERS)), start)
print("slots 4 to 7 are empty: the base counts nothing")

for slot in range(4, ADAPTERS):
    served = tied_lora.put(served, slot, adapters[slot])  # while it runs
slots = np.array([7, 6, 5, 4, 3, 2, 1, 0])
begin = time.perf_counter()
found = continued(tied_lora.select(served, slots), start)
seconds = time.perf_counter() - begin
for row, slot in enumerate(slots):
    print(f"from {row} in steps of {slot + 1}: {' '.join(map(str, found[row]))}")
print(f"{found.size} tokens in {seconds:.2f} s; the step was traced {traces} time(s)")

# The same as each adapter merged, alone.
plain = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
same = 0
for row, slot in enumerate(slots):
    merged, tokens = tied_lora.merge(adapters[slot]), start[row : row + 1]
    own = jax.tree.map(lambda x: x[:1] if x.ndim else x, cache)
    for column in range(found.shape[1]):
        logits, new = plain({"params": merged, "cache": own}, tokens)
        tokens, own = jnp.argmax(logits, axis=-1), new["cache"]
        same += int(tokens[0, 0]) == found[row, column]
print(f"merged and run alone, the adapters give the same tokens: {same} of {found.size}")
