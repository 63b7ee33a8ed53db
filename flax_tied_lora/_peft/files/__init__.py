"""What is on disk: safetensors, strict JSON, and the replacement of a folder's files."""
