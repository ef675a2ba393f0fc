"""Checkpoints that others quantized: a layout a file, each read as 16-bit weights, its bits counted as stored."""
