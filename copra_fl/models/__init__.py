"""The adapted model: a frozen base, LoRA adapters in it, a task head on top; built, saved and sized."""
