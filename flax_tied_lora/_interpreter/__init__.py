"""A traced program evaluated with symbolic weights: the loop, the rules, the call sites it meets.

Knows the algebra; no plan and no config.
"""
