"""``python -m kbit.bench``: measure kernels and k-bit models against others' and the limit, in one run."""
