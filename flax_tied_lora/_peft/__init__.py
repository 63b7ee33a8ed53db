"""A wing: PEFT's adapter files and merged models for PyTorch, in and out.

Knows the adapters, `merge`, `wrap` and names; safetensors. No other wing.
"""
