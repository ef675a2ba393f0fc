"""SLURM: query asks the scheduler on a login node, node runs on a compute node, show tells people."""
