"""The quantizer: codebooks, blocks, codes, packing; blockwise is the reference that kernels must equal."""
