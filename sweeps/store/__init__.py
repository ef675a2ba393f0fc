"""TRUTH: immutable parquet parts, their rows and their columns."""
