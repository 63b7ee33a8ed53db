"""A wing: checkpoints with Orbax, of adapters and of full params with their ties.

Knows the adapters and `wrap`; Orbax. No other wing.
"""
