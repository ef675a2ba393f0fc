"""MEASURED: what the orchestrator itself takes, over studies of growing size."""
