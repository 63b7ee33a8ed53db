"""What the user asks for: `LoraConfig`, its checks, its contradictions, its form as JSON.

Knows nothing of params or of traced programs.
"""
