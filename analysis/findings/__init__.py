"""What the data say about the paper's questions.

sentences  findings as sentences with their numbers
"""

from analysis.findings.sentences import SampleKey, findings, wanted_samples

__all__ = ["SampleKey", "findings", "wanted_samples"]
