"""The symbolic weight: labelled factors, the terms of a weight, and the products of each.

Knows arrays; no jaxpr, no plan, no config.
"""
