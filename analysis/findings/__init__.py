"""What the data say about the paper's questions.

sentences  findings as sentences with their numbers
finding    one of the paper's claims held against the data: evidence, effect, verdict
"""

from analysis.findings.finding import Finding, Verdict
from analysis.findings.sentences import SampleKey, findings, wanted_samples

__all__ = ["Finding", "SampleKey", "Verdict", "findings", "wanted_samples"]
