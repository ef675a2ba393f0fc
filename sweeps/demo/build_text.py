"""Make the demo's text from The Jargon File 4.4.7 (public domain): ``python sweeps/demo/build_text.py
dict-jargon_4.4.7-3.1_all.deb``.

Reads Debian's ``dict-jargon`` package, or the directory that has its ``jargon.dict.dz`` and ``jargon.index``, and
writes jargon.jsonl, jargon_lastword.jsonl and jargon_choice.jsonl next to this file, in ``text/``. Deterministic: order
and choices come from hashes of the headwords. No entry serves two files. README.md says what the files are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
PROSE_CHARS = 260_000
LASTWORD_DOCS, CHOICE_DOCS, CHOICES = 100, 50, 4
LASTWORD_CHARS = (180, 330)
QUERY_CHARS, ENDING_CHARS, OPENING_WORDS = (60, 150), (30, 90), 4
LENGTH_RATIO = 1.25
"""A wrong ending is at most so much longer or shorter than the right one."""
ASCII = str.maketrans(
    {0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0x2014: "--", 0x2013: "-", 0x2026: "...", 0xB7: "."}
)
"""Typographic quotation marks, dashes, ellipses and middle dots."""
LABELS = re.compile(r"^(?:(?:\d+\.|\[[^]]*\]|(?:v|vt|vi|n|adj|adv|interj|prov|abbrev|excl|prep|obs)\.[,;]?)\s+)+")
"""Number of a sense, origin, part of speech, before an entry's prose."""
ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|esp|cf|vs|etc|Dr|Mr|Mrs|Ms|St|Prof|Jr|No|pp|ca|approx|orig|obs|usu|var|[Aa]dj|[Aa]dv|[A-Zvn])\.$"
)
PLAIN_OPENING = r"[A-Z][\w', ]*\w"
STOPWORDS = frozenset(
    """
    about above after again also another anything around because been before being best better both came come could
    does doing done down each even ever every first from good have here into just kind know last less like little
    made make many more most much must never nothing often only other others over part same several should since
    some something still such sure than that their them then there these they thing things this those time times
    under until upon used using usually very want well were what when where which while will with within without
    work would years your
    """.split()  # noqa: SIM905  # a list literal would be one word a line
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A headword and the prose paragraphs under it."""

    headword: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)

    @property
    def order(self) -> str:
        return hashlib.sha256(f"jargon {self.headword}".encode()).hexdigest()


def read_package(path: Path) -> tuple[bytes, str]:
    """Read the dictionary's text and its index, from the .deb or from a directory that holds the two files."""
    if path.is_dir():
        dictionary, index = next(path.rglob("jargon.dict.dz")), next(path.rglob("jargon.index"))
        return gzip.decompress(dictionary.read_bytes()), index.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["dpkg-deb", "-x", str(path), directory], check=True)
        return read_package(Path(directory))


def entries(dictionary: bytes, index: str) -> Iterator[Entry]:
    """Yield the dictionary's entries that have prose, in its own order, each once (several headwords may share one)."""
    places = set()
    for line in index.splitlines():
        headword, start, length = line.split("\t")
        if not headword.startswith("00-database"):
            places.add((number(start), number(length)))
    for offset, size in sorted(places):
        headword, _, body = dictionary[offset : offset + size].decode("utf-8").partition("\n")
        paragraphs = tuple(filter(None, map(clean, re.split(r"\n\s*\n", body))))
        if paragraphs:
            yield Entry(headword=headword.translate(ASCII).strip(), paragraphs=paragraphs)


def number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + BASE64.index(digit)
    return value


def clean(paragraph: str) -> str:
    """Reduce to one line of prose; empty for pronunciations, pictures, listings, verse and bare cross-references."""
    lines = [line for line in paragraph.splitlines() if line.strip()]
    if not lines or any(not re.match(r"    \S", line) for line in lines):
        return ""
    text = " ".join(line.strip() for line in lines).translate(ASCII)
    text = re.sub(r"\{\s*(.*?)\s*\}", r"\1", text)
    text = re.sub(r'(^|\s)(["\']) (?=\w)', r"\1\2", text)  # a quotation mark that a line break tore from its word
    text = re.sub(r'(?<=[\w.,!?]) (["\'])(?=[\s.,;:)]|$)', r"\1", text)
    text = re.sub(LABELS, "", text)
    text = re.sub(r"\s*(?:See(?: also)?|Compare|Contrast|Syn\.|Cf\.)(?: also)? [^.]*\.(?=\s|$)", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    prose = len(text) >= 60 and text.isascii() and text[-1] in ".!?\"')" and "http" not in text and "ftp" not in text
    return text if prose and sum(c.isalpha() or c == " " for c in text) > 0.9 * len(text) else ""


def sentences(paragraph: str) -> list[str]:
    """Split into sentences. Nothing is split after an abbreviation."""
    parts: list[str] = []
    for piece in re.split(r"(?<=[.!?])(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[A-Z\"'(])", paragraph):
        if parts and ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    return parts


def lastword(entry: Entry) -> dict[str, str] | None:
    """LAMBADA's form: a passage that ends in a word to be predicted, one that occurred in it before; the final point is
    left off.
    """
    for paragraph in entry.paragraphs:
        parts = sentences(paragraph)
        for end in range(1, len(parts)):
            for start in range(end):
                match = re.fullmatch(r"(.*\s)([a-z]{4,})[.!?]", " ".join(parts[start : end + 1]))
                if not match or not LASTWORD_CHARS[0] <= len(match[0]) <= LASTWORD_CHARS[1]:
                    continue
                earlier, word = match.groups()
                if word not in STOPWORDS and re.search(rf"\b{word}\b", earlier):
                    return {"headword": entry.headword, "text": earlier + word}
    return None


def candidates(entry: Entry) -> Iterator[tuple[str, str]]:
    """(a sentence and the opening of the next one, the rest of that) of an entry, where the rest takes up a word of the
    first sentence.
    """
    for paragraph in entry.paragraphs:
        parts = sentences(paragraph)
        for before, after in itertools.pairwise(parts):
            words = after.split(" ")
            opening, ending = " ".join(words[:OPENING_WORDS]), " ".join(words[OPENING_WORDS:])
            shared = content_words(before) & content_words(ending)
            if (
                shared
                and fits(before, QUERY_CHARS)
                and fits(ending, ENDING_CHARS)
                and re.fullmatch(PLAIN_OPENING, opening)
                and ". " not in ending
            ):
                yield f"{before} {opening}", ending


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower())) - STOPWORDS


def fits(text: str, lengths: tuple[int, int]) -> bool:
    return lengths[0] <= len(text) <= lengths[1]


def choice(entry: Entry, query: str, right: str, pool: list[tuple[str, str]]) -> dict[str, object] | None:
    """HellaSwag's form: a headword, a sentence, the next one's opening, and four endings of it; the wrong ones end
    sentences of other entries.
    """
    seed = f"{entry.headword} {query}"
    alike = [
        (hashlib.sha256(f"{seed} {ending}".encode()).hexdigest(), ending)
        for headword, ending in pool
        if headword != entry.headword and 1 / LENGTH_RATIO <= len(ending) / len(right) <= LENGTH_RATIO
    ]
    if len(alike) < CHOICES - 1:
        return None
    endings = [ending for _, ending in sorted(alike)[: CHOICES - 1]]
    label = int(hashlib.sha256(seed.encode()).hexdigest(), 16) % CHOICES
    endings.insert(label, right)
    return {"headword": entry.headword, "query": f"{entry.headword}: {query}", "endings": endings, "label": label}


def build(all_entries: list[Entry]) -> dict[str, list[dict[str, object]]]:
    """Make the files' rows. Entries are dealt in the order of their hashes: tasks first, the rest is the perplexity
    text.
    """
    dealt = sorted(all_entries, key=lambda entry: entry.order)
    used: set[str] = set()
    passages: list[dict[str, object]] = []
    for entry in dealt:
        passage = lastword(entry)
        if passage and len(passages) < LASTWORD_DOCS:
            passages.append(dict(passage))
            used.add(entry.headword)
    rest = [entry for entry in dealt if entry.headword not in used]
    firsts = ((entry, next(candidates(entry), None)) for entry in rest)
    asked = [(entry, *found) for entry, found in firsts if found][:CHOICE_DOCS]
    pool = [(entry.headword, right) for entry, _, right in asked]
    choices = [row for entry, query, right in asked if (row := choice(entry, query, right, pool))]
    used |= {entry.headword for entry, _, _ in asked}
    prose: list[dict[str, object]] = []
    size = 0
    for entry in dealt:
        if entry.headword not in used and size < PROSE_CHARS:
            prose.append({"headword": entry.headword, "text": f"{entry.headword}: {entry.text}"})
            size += len(entry.text)
    return {"jargon": prose, "jargon_lastword": passages, "jargon_choice": choices}


def jsonl(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    for row in rows:
        text.write(json.dumps(row, ensure_ascii=False) + "\n")
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "package", type=Path, help="dict-jargon's .deb, or a directory with jargon.dict.dz and jargon.index"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text", help="where the three files go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in build(list(entries(*read_package(args.package)))).items():
        file = args.out / f"{name}.jsonl"
        file.write_text(jsonl(rows), encoding="utf-8")
        print(f"{file}: {len(rows)} documents, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
