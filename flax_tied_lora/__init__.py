"""LoRA for Flax models with tied weights: one delta wherever a shared matrix is read."""

from flax_tied_lora._config import LoraConfig as LoraConfig
