"""A wing: the same functions for an `nnx.Module`, and `AdaptedModule`.

Knows the verbs and all below; alone in knowing `flax.nnx`.
"""
