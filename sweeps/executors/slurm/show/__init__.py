"""Answers to what a person asks about SLURM jobs: state, logs, cancel, watch."""
