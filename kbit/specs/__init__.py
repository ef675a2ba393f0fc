"""Specs of methods beside ``kbit.spec``: a file per method. None imports torch: planning stays light."""
