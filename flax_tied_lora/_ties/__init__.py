"""Which leaves are one array: tie groups, and the sources they are known from.

Knows leaf paths and call sites.
"""
