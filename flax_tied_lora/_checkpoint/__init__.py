"""The parts of `flax_tied_lora.checkpoint`.

stored.py: pytrees in Orbax's files, checked. record.py: what else a checkpoint says about itself.
fingerprint.py: checksums, and which base it was. refit.py: a plan put on a base again.
full_params.py: params whole, each tie stored once.
"""
