"""Directories with a LoRA adapter, as PEFT writes them: written, and read."""
