"""Layers and models held in k bits: in memory, on disk, and put in place of 16-bit layers."""
