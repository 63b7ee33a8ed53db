"""The cross-entropy of a projection as one operation: its chunks, its primitive and its rule.

Knows the algebra and the interpreter.
"""
