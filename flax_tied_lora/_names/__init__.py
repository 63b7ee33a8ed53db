"""The parts of `flax_tied_lora.names`.

layout.py: which axes of a leaf are which axes of a parameter. table.py: one line of a table of
names. families.py: transformers' families, tunix.py: tunix's. state.py: whole params to a state
dict and back.
"""
