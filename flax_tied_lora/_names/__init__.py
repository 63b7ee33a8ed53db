"""Flax paths and PyTorch names: layouts, tables, families, and whole state dicts.

Knows leaf paths; nothing of adapters.
"""
