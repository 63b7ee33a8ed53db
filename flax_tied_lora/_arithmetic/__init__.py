"""A wing: adapters combined, scaled, padded and extracted.

Knows the adapters and plans. No other wing.
"""
