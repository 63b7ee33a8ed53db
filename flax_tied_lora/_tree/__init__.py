"""Params as a pytree: leaf paths, boxes, random keys, shardings, processes, locks, quantisation.

Knows JAX and Flax's boxes; nothing of this library.
"""
