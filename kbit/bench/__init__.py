"""``python -m kbit.bench``: how fast kernels and k-bit models are here, beside others' and the limit, from one run."""
