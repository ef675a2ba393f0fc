"""Layer by layer: models that fit nowhere. A block is read once, quantized for each cell of a pack, applied to that
cell's activations, and left.
"""
