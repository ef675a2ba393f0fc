"""Code that runs on a compute node: a job, one attempt at a pack, the preflight."""
