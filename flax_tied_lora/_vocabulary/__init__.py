"""A wing: tokens added to the vocabulary of params, or of an `Adapted`.

Knows the verbs and all below; no other wing.
"""
