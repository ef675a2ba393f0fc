"""The tests, in folders that mirror the tree."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The project's directory."""
