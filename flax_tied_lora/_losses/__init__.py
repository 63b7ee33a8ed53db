"""Losses that never hold the logits: the arithmetic of a chunk of tokens, and the primitive.

Underscored rooms of `flax_tied_lora.losses`, which is what is public.
"""
