"""A wing: the same for an `nnx.Module`. Alone in knowing `flax.nnx`."""
