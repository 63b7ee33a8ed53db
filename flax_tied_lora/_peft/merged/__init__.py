"""Merged models: written as a directory that transformers loads."""
