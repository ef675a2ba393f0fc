"""Each quantization beside plain rounding of at most as many bits, with paired intervals.

pairs    which cells are compared, and how far they are apart
command  ``python -m analysis beside``
"""

from analysis.beside.pairs import BESIDE_COLUMNS, beside_markdown, beside_rounding

__all__ = ["BESIDE_COLUMNS", "beside_markdown", "beside_rounding"]
