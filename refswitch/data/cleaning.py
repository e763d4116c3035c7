# May import: standard library, numpy, refswitch.data (sources).
"""Cleaning of raw pages: the rules of C4, and repeated text kept once.

Paper: 4.1 ("an improved C4" without repetitions inside an example). Rules as in T5: lines that end like a sentence and have five words; no notice
about scripts, cookies or terms of use; pages of three sentences, without placeholder text or program code. The rules that need a list of words or a
model of languages (bad words, language detection) are not here: their lists are the user's choice. A sentence ends at its mark before a space: no
model of abbreviations either.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from refswitch.data.sources import Document

END_MARKS = (".", "?", "!", '"')
ELLIPSIS = "..."
LEAST_WORDS = 5
LONGEST_WORD = 1000
LEAST_SENTENCES = 3
SPAN = 3  # sentences that are compared together
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
RECENT = 1 << 20


def sentences_of(text: str) -> list[tuple[int, int]]:
    """Return where each sentence begins and ends, its following space included: together they are the whole text."""
    cuts = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [(start, end) for start, end in itertools.pairwise(cuts) if start < end]


def clean_page(text: str) -> str:
    """Return a page's lines that read like text, or nothing where the page as a whole does not.

    As in C4's own program, the marks of a bad page (placeholder text, a curly bracket) count where they stand in a line that ends like a sentence
    and has words enough.
    """
    kept = []
    for line in text.splitlines():
        line = line.strip()
        if any(len(word) > LONGEST_WORD for word in line.split()):
            continue
        line = CITATION.sub("", line)
        if not line.endswith(END_MARKS) or line.endswith(ELLIPSIS) or len(line.split()) < LEAST_WORDS:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return ""
        if "javascript" in lower:
            continue
        if "{" in line:
            return ""
        if not any(policy in lower for policy in POLICY):
            kept.append(line)
    return "\n".join(kept) if sum(len(sentences_of(line)) for line in kept) >= LEAST_SENTENCES else ""


class Seen:
    """A set of 64-bit numbers at 8 bytes each: recent ones in a set, older ones in one sorted array."""

    def __init__(self) -> None:
        self.recent: set[int] = set()
        self.older = np.empty(0, np.uint64)

    def __contains__(self, number: int) -> bool:
        i = int(np.searchsorted(self.older, np.uint64(number))) if self.older.size else 0
        return number in self.recent or (i < self.older.size and int(self.older[i]) == number)

    def add(self, number: int) -> None:
        """Remember a number."""
        self.recent.add(number)
        if len(self.recent) >= RECENT:
            self.older = np.union1d(self.older, np.fromiter(self.recent, np.uint64, len(self.recent)))
            self.recent.clear()


def span_hash(sentences: list[str]) -> int:
    """Return 64 bits of a span's text, without regard to case and space."""
    plain = " ".join(" ".join(sentences).lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents without spans of three sentences that stood before, there or in an earlier document; of a shorter text the whole is the
    span.

    Spans overlap: a repeated passage of five sentences goes as a whole, since each of its three spans does. Remembers 8 bytes for each sentence of
    the corpus.
    """
    seen = Seen()
    for document in documents:
        parts = [document.text[start:end] for start, end in sentences_of(document.text)]
        keep = [True] * len(parts)
        for first in range(max(len(parts) - SPAN + 1, 1)):
            mark = span_hash(parts[first : first + SPAN])
            if mark in seen:
                keep[first : first + SPAN] = [False] * len(keep[first : first + SPAN])
            seen.add(mark)
        yield document._replace(text="".join(part for part, kept in zip(parts, keep, strict=True) if kept))
