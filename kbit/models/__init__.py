"""Whole models: which layers are quantized, how checkpoints load, where models lie, how they are put back."""
