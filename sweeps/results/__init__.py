"""READS: tables of results, progress, what the end of a run shows."""
