"""Merged models: a directory that transformers loads."""
