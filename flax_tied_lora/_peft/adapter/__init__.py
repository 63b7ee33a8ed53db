"""PEFT's adapter folders: written, and read back."""
