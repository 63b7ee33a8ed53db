"""NNX modules: what is in `flax_tied_lora.nnx`, in rooms of its own.

`leaves` knows a module's params by path, `calling` runs a method with symbolic weights, and
`module` is the module that a person holds.
"""
