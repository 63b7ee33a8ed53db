"""From a config to a plan: what is targeted, which axes are rows, what tying means for a group.

Knows config, ties and call sites; no evaluator, and of arrays only shapes.
"""
