"""The adapted model: a frozen base with LoRA adapters and a task head; how it is built, saved and sized."""
