"""What the data say about the paper's questions.

sentences     findings as sentences with their numbers
claims        the paper's claims, and judge: each with its evidence, effect and verdict
about_*       the claims themselves: of scaling, of zero-shot quantization, of GPTQ
evidence      a study's cells by model and quantization; selections: which of them a claim is about
contrasts     how much better one kind of cells is than another, at equal bits; on_samples: of a single model
testing       from contrasts to p-values for and against; finding: verdicts
judging       what is stored, with the samples that claims ask for; text: for people, and as JSON
"""

from analysis.findings.claims import CLAIMS, judge
from analysis.findings.finding import Finding, Verdict
from analysis.findings.sentences import findings, wanted_samples

__all__ = ["CLAIMS", "Finding", "Verdict", "findings", "judge", "wanted_samples"]
