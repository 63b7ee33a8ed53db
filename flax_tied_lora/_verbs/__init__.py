"""One file for each function that a user calls on params: wrap, adapt, trace, explain, merge ...

Knows all folders above, and none of the wings.
"""
