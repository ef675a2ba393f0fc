"""GGUF files: written from a model's cell, and read back as a model."""
