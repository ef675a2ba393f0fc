"""Models whose weights are read from their files when they are needed, and dropped after."""
