"""COMPUTES: worker processes, warm models, the time budget, devices."""
