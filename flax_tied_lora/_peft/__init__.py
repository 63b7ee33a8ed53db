"""A wing: PEFT's adapter files, read and written, and merged models for PyTorch, written.

Knows the adapters, `merge`, `wrap` and names; safetensors. No other wing.
"""
