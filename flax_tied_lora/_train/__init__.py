"""A wing: training with Optax. A step, gradients of the adapters, labels for them, LoRA+.

Knows the adapters and plans; Optax.
"""
