"""Where the bits of a quantized model go, and what its layers lose: a report of one spec on one model."""
