"""MIRROR: W&B, which can always be rebuilt from the store."""
