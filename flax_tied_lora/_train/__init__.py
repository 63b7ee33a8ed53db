"""A wing: training with Optax. Gradients of the adapters, labels for them, LoRA+.

Knows the adapters and plans; Optax.
"""
