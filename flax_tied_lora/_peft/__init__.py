"""The parts of `flax_tied_lora.peft`.

files.py: a directory with an adapter, read and written. tensors_in.py, headers_in.py: safetensors
files read, one tensor at a time; tensors_out.py: and written. formats.py: what is in them.
replacement.py: new files that take the place of old ones together. strict_json.py: JSON from files
that may hold anything. errors.py: what is raised.
"""
