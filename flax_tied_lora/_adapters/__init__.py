"""The adapters of a plan: made, held beside the frozen params, read as terms, stacked in slots.

Knows plans and the algebra; no evaluator.
"""
