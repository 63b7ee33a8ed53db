"""Files on disk: safetensors, strict JSON, and the replacement of a directory's files."""
